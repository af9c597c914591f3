"""What a composition has to beat, on the same rows and with nothing trained for it: the LoRAs' mean, and each alone."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from lamella.adapters import map_to, read_lora
from lamella.adapters.card import CARD, read_card
from lamella.adapters.heads import fit_head, standing_in
from lamella.lab.methods import Method
from lamella.lab.methods.compositions import ComposingMethod, lora_folder
from lamella.lab.scoring import Scores, summands
from lamella.progress import counted
from lamella.statistics import SIGNIFICANT, contrast
from lamella.tuners.mole import fixed_weights

COMPOSITION, MEAN = "the composition", "the mean"
_MOST_ALONE = 16  # LoRAs; of more only the mean is scored
_OWN, _TRAINED = "own", "the composition's"  # heads

ScoreAll = Callable[[], Mapping[str, Scores]]


def has_controls(method: Method) -> bool:
    """Whether a method mixes trained LoRAs by routers, whose weights can be fixed for a comparison."""
    return isinstance(method, ComposingMethod) and method.masked_by == "routers" and method.is_mixture


def measure_controls(
    model: PeftModel, adapters: Mapping[str, str], scores: Mapping[str, Scores], score: ScoreAll
) -> dict[str, Any]:
    """Score the mean of the LoRAs and each LoRA alone, a pass over the rows for each.

    A LoRA alone answers with the head that it was trained with, where that is for the labels of the task; all else
    with the composition's.

    Args:
        model: the trained composition.
        adapters: its LoRAs' places, by name.
        scores: its own, by split.
        score: scores the model as it is then, on the same splits.

    Returns:
        Plain values: ``scores`` by control and split, ``heads`` by control where one was trained, ``differences`` of
        the composition from each control on ``split``, the last one scored, in ``measure``; ``passes``, ``seconds``,
        and how many LoRAs were ``left_out``.
    """
    started = time.perf_counter()
    mean = dict.fromkeys(adapters, 1.0 / len(adapters))
    alone = {f"{name} alone": name for name in adapters if len(adapters) <= _MOST_ALONE}
    found: dict[str, Mapping[str, Scores]] = {}
    heads: dict[str, str] = {}
    trains_head = any(isinstance(module, ModulesToSaveWrapper) for module in model.modules())
    for control in counted([MEAN, *alone], "scoring what it has to beat", "passes"):
        name = alone.get(control)
        with ExitStack() as changed:
            changed.enter_context(fixed_weights(model, mean if name is None else {name: 1.0}))
            has_own = name is not None and changed.enter_context(_own_head(model, name, adapters[name]))
            found[control] = score()
        if trains_head or has_own:
            heads[control] = _OWN if has_own else _TRAINED
    split = list(scores)[-1]
    return {
        "scores": {name: {split: one.metrics for split, one in by_split.items()} for name, by_split in found.items()},
        "heads": heads,
        "split": split,
        **_differences({COMPOSITION: scores[split]} | {name: by_split[split] for name, by_split in found.items()}),
        "passes": len(found),
        "seconds": time.perf_counter() - started,
        "left_out": len(adapters) - len(alone),
    }


@contextmanager
def _own_head(model: PeftModel, name: str, place: str) -> Iterator[bool]:
    """Puts what a LoRA was trained with whole in place, where it is for the model's labels; says whether it did."""
    base, folder = model.get_base_model(), lora_folder(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when it was composed
        whole = map_to(base, read_lora(folder, name=name)).whole
    card = Path(folder) / CARD
    labels = read_card(card).labels if card.is_file() else ()
    has_own = False
    with ExitStack() as changed:
        for head, tensors in whole.items():
            trained = isinstance(base.get_submodule(head), ModulesToSaveWrapper)
            spot = f"{head}.modules_to_save.{model.active_adapter}" if trained else head
            own = fit_head(base, spot, tensors, labels).tensors
            if own is not None:
                changed.enter_context(standing_in(base.get_submodule(spot), own))
                has_own = True
        yield has_own


def _differences(scored: Mapping[str, Scores]) -> dict[str, Any]:
    """How far the composition is from each control, in a measure that is a mean over examples."""
    parts = {name: summands(scores.columns) for name, scores in scored.items()}
    measure = next(iter(parts.values()))[0]
    by_name = {name: {0: values} for name, (_, values) in parts.items()}
    made = contrast(by_name, [(COMPOSITION, name) for name in scored if name != COMPOSITION])
    differences = {
        one.second: {
            "difference": one.interval.difference,
            "interval": [one.interval.low, one.interval.high],
            "p": one.p_value,
        }
        for one in made
    }
    return {"measure": measure, "differences": differences}


def controls_sentences(controls: Mapping[str, Any]) -> list[str]:
    """What was found, in words; whose heads answered; and what it cost."""
    said = [_verdict(controls)]
    own = [name for name, head in controls["heads"].items() if head == _OWN]
    if others := [name for name, head in controls["heads"].items() if head == _TRAINED]:
        with_own = f" {', '.join(own)}: with the LoRA's own head." if own else ""
        said.append(f"{', '.join(others)}: with the head that was trained beside the routers, for them.{with_own}")
    cost = f"These are {controls['passes']} more passes over the rows, {controls['seconds']:.0f} s."
    if count := controls["left_out"]:
        cost += f" The {count} LoRAs alone would be {count} more: lamella library shortlist says which of them help."
    return [*said, cost]


def _verdict(controls: Mapping[str, Any]) -> str:
    differences, less_is_better = controls["differences"], controls["measure"] != "accuracy"
    sure = {name: one for name, one in differences.items() if one["p"] < SIGNIFICANT}
    beaten = [name for name, one in sure.items() if (one["difference"] < 0) == less_is_better]
    behind = [name for name in sure if name not in beaten]
    unsure = [name for name in differences if name not in sure]
    rows = f"By {controls['measure']} on {controls['split']} rows the composition"
    parts = [
        f"is better than {', '.join(beaten)}" if beaten else "",
        f"is worse than {', '.join(behind)}" if behind else "",
        f"differs from {', '.join(unsure)} by no more than chance" if unsure else "",
    ]
    return f"{rows} {'; it '.join(filter(None, parts))} (95 % intervals over examples, Holm-corrected; one seed)."
