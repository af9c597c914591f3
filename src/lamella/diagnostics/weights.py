"""NaN and infinity in tensors, and targets that match nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from lamella.diagnostics.running import transformer
from lamella.findings import Examination


def examine_numbers(tensors: Mapping[str, Tensor], what: str, examination: Examination) -> None:
    """Looks for NaN and infinity."""
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        examination.error(
            "not-finite",
            f"{len(broken)} of {len(tensors)} tensors of {what} hold NaN or infinity",
            broken,
            "every output that depends on them is NaN",
            "train again from the last good checkpoint with a lower lr or more warm-up; if only the file is broken, "
            "save it again",
        )
    examination.saw(f"numbers of {what}: {len(tensors)} tensors")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def examine_targets(model: nn.Module, config: Any, adapter: str, examination: Examination) -> None:
    """Looks for names in ``target_modules`` that no module of the model has."""
    targets = getattr(config, "target_modules", None)
    if not targets or targets == DUMMY_TARGET_MODULES or targets == "all-linear":
        return
    names = [name for name, _ in transformer(model).named_modules()]
    missing = [target for target in _targets(targets) if not _matches(target, names, isinstance(targets, str))]
    if missing:
        examination.error(
            "target-unmatched",
            f"target_modules names {', '.join(map(repr, missing))}, which no module of "
            f"{type(transformer(model)).__name__} matches{_near(missing, names)}",
            f"adapter {adapter!r}",
            "the modules that were meant are not adapted, and less is trained than it seems",
            "correct the names, or adapt another model",
        )
    examination.saw(f"target modules of adapter {adapter!r}: {len(_targets(targets))} name(s)")


def describe_skipped(model: nn.Module, examination: Examination) -> None:
    """Says which modules matched the targets and were left alone."""
    for adapter, summary in getattr(getattr(model, "base_model", None), "summaries", {}).items():
        for name, reason in summary.skipped:
            examination.saw(f"left alone by adapter {adapter!r}: {name}, {reason}")


def _targets(targets: str | Iterable[str]) -> list[str]:
    return [targets] if isinstance(targets, str) else sorted(targets)


def _matches(target: str, names: Iterable[str], is_pattern: bool) -> bool:
    if is_pattern:
        return any(re.fullmatch(target, name) for name in names)
    return any(name == target or name.endswith(f".{target}") for name in names)


def _near(missing: Iterable[str], names: Iterable[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in names})
    near = {target: difflib.get_close_matches(target, ends, n=1) for target in missing}
    said = [f"{target!r} may be {match[0]!r}" for target, match in near.items() if match]
    return f" ({', '.join(said)})" if said else ""
