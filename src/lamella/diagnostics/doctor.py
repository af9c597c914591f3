"""Does a model, a run or an adapter do what it claims? `doctor` looks, and says what it looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from lamella.diagnostics.adapter_folder import (
    CONFIG,
    examine_files,
    examine_fit,
    examine_loaded_tensors,
    examine_name,
    load_adapter,
    load_base,
)
from lamella.diagnostics.equivalence import examine_roundtrip
from lamella.diagnostics.running import base_of, clone, random_batch
from lamella.diagnostics.training_step import examine_effects, examine_method
from lamella.diagnostics.usage import examine_usage
from lamella.diagnostics.weights import describe_skipped, examine_numbers, examine_targets, tensors_of
from lamella.errors import LamellaError
from lamella.findings import Diagnosis, Examination, Finding
from lamella.tuners.routed import routed_layers

__all__ = ["Diagnosis", "Finding", "doctor"]

Batches = Iterable[Mapping[str, Any]]
ExamineFolder = Callable[[Path, nn.Module | str | None, list[dict[str, Any]] | None, Examination], None]
_FOLDERS: dict[str, ExamineFolder] = {}


def doctor(
    model_or_path: nn.Module | str | Path, base: nn.Module | str | None = None, batches: Batches | None = None
) -> Diagnosis:
    """Examines a model with an adapter, an adapter folder in PEFT's format, or the folder of a run or a study.

    Looks for NaN and infinity, targets that match nothing, a balance coefficient without balance loss, routers
    without gradient, files that are missing, pickled, unreadable or unknown in a part, an adapter that is not of its
    base, tensors dropped or extra, files that load unequal, and, on real batches or on a run's own trace, for collapsed
    routers, entropy near zero and experts that never fire. What could not be examined is said.

    Args:
        model_or_path: the model, which is left exactly as it was, or the folder.
        base: for a folder: the model, or its name or path, to load the adapter on; by default the one named in its
            config, or in a run's settings.
        batches: arguments of the model's forward on real data. Without them random token ids serve for a training
            step, and routing is judged on a run's trace alone.

    Raises:
        LamellaError: the folder holds no adapter, the given base cannot be loaded, or the model has no adapter.
    """
    held = None if batches is None else [dict(batch) for batch in batches]
    if held == []:
        raise LamellaError("batches is empty. Give at least one batch, or leave batches out.")
    examination = Examination()
    if isinstance(model_or_path, nn.Module):
        _examine_model(model_or_path, base, held, examination)
    else:
        _examine_path(Path(model_or_path), base, held, examination)
    return examination.diagnosis()


def _examine_model(
    model: nn.Module, base: nn.Module | str | None, batches: list[dict[str, Any]] | None, examination: Examination
) -> None:
    if not getattr(model, "peft_config", None):
        raise LamellaError(
            f"{type(model).__name__} has no adapter to examine; apply one with get_peft_model(model, MolaConfig(...)), "
            "or give the folder of an adapter or a run."
        )
    if base is not None:
        raise LamellaError("base belongs to a folder; a model has its base in it. Leave base out.")
    _examine_loaded(model, batches, examination)
    if any(finding.severity == "error" for finding in examination.findings):
        examination.saw("saved loads equal: not examined before the errors are mended")
    else:
        examine_roundtrip(model, batches[0] if batches else random_batch(model), examination)
    say_without_batches(model, batches, examination)


def _examine_loaded(model: nn.Module, batches: list[dict[str, Any]] | None, examination: Examination) -> None:
    """What can be said of any model with an adapter."""
    before = len(examination.findings)
    examine_numbers(tensors_of(model), type(model).__name__, examination)
    for adapter, config in getattr(model, "peft_config", {}).items():
        examine_targets(model, config, adapter, examination)
    describe_skipped(model, examination)
    if any(finding.code == "not-finite" for finding in examination.findings[before:]):
        examination.saw("balance loss, gradients and routing: not examined, since numbers are broken")
        return
    examine_effects(model, batches[0] if batches else random_batch(model), examination)
    if batches:
        examine_method(model, batches[0], examination)
        examine_usage(model, batches, examination)


def register_folder(marker: str, examine: ExamineFolder) -> None:
    """Lets `doctor` examine another kind of folder, which it knows by a file of that name in it.

    The laboratory registers folders of runs when it is imported.

    Args:
        marker: such as "run.yaml".
        examine: given the folder, and base and batches as `doctor` was given them; adds to the examination.
    """
    _FOLDERS[marker] = examine


def _examine_path(
    path: Path, base: nn.Module | str | None, batches: list[dict[str, Any]] | None, examination: Examination
) -> None:
    if (path / CONFIG).is_file():
        say_without_batches(examine_adapter(path, base, None, batches, examination), batches, examination)
        return
    with suppress(ModuleNotFoundError):  # pip install lamella, without the extra
        import_module("lamella.lab")
    for marker, examine in _FOLDERS.items():
        if (path / marker).is_file():
            examine(path, base, batches, examination)
            return
    raise LamellaError(
        f"{path} is neither the folder of an adapter (it has no {CONFIG}) nor of a run (no run.yaml) or a study (no "
        "study.yaml)."
        if path.is_dir()
        else f"There is no folder {path}."
    )


def examine_adapter(
    folder: Path,
    base: nn.Module | str | None,
    default: str | None,
    batches: list[dict[str, Any]] | None,
    examination: Examination,
    loaded: PeftModel | None = None,
) -> nn.Module | None:
    """Files, base, fit, load, then the loaded model.

    Args:
        folder: of the adapter.
        base: as `doctor` was given it.
        default: name of the base where none is given.
        batches: as `doctor` was given them.
        examination: takes the findings.
        loaded: the folder's model where it has been loaded already; it is made trainable.

    Returns:
        The model; None where it could not be loaded or need not be.
    """
    files = examine_files(folder, examination)
    if files.config is None or files.tensors is None or any(f.code == "not-finite" for f in examination.findings):
        examination.saw("base, load and training step: not examined, the files have to be mended first")
        return None
    if loaded is not None:
        bare = base_of(clone(loaded, on_meta=True))
        examine_name(files.config, bare, examination)
        if examine_fit(files, bare, examination):
            examine_loaded_tensors(loaded, files, examination)
            if not files.config.is_prompt_learning:
                loaded.active_peft_config.inference_mode = False
                loaded.set_adapter(loaded.active_adapter)
        _examine_loaded(loaded, batches, examination)
        return loaded
    name = base if base is not None else default or files.config.base_model_name_or_path
    if isinstance(name, nn.Module):
        if getattr(name, "peft_config", None):
            raise LamellaError("The base that was given has an adapter already. Give the bare model, or its path.")
        bare = clone(name)
    elif name:
        loaded = _load_base(files.config, files.tensors, name, given=base is not None, examination=examination)
        if loaded is None:
            return None
        bare = loaded
    else:
        raise LamellaError(f"{folder / CONFIG} names no base model. Give it as base (--base).")
    examine_name(files.config, bare, examination)
    if not examine_fit(files, bare, examination):
        examination.saw("load and training step: not examined, the adapter does not fit")
        return None
    model = load_adapter(folder, files, bare, examination)
    if model is not None:
        _examine_loaded(model, batches, examination)
    return model


def _load_base(config: Any, tensors: Any, name: str, *, given: bool, examination: Examination) -> nn.Module | None:
    try:
        return load_base(config, tensors, name)
    except LamellaError as error:
        if given:
            raise
        examination.error(
            "base-missing",
            str(error),
            f"base_model_name_or_path in {CONFIG}",
            "without its base an adapter is nothing, and most of it could not be examined",
            "give the base where it lies on this machine (--base)",
        )
        return None


def say_without_batches(
    model: nn.Module | None, batches: list[dict[str, Any]] | None, examination: Examination
) -> None:
    if model is not None and batches is None and routed_layers(model):
        examination.saw("routing statistics: not examined on real data; give batches, or the folder of a run")
