"""What a kept study answers, in sentences that follow from its figures alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import pandas as pd

from lamella.lab.data.derived import parts_of
from lamella.lab.studies.continual import Continual
from lamella.lab.studies.results import Results
from lamella.statistics import Contrast
from studies.depth import depth_table
from studies.keep import KeptStudy
from studies.tables import difference_in_words, number

_LEARNED_NOTHING = 0.02  # above the commonest label, in accuracy
_CONTROLS = ("random", "fixed", "self", "uniform")

_Answer = Callable[[KeptStudy, Results], str | None]


def answers(study: KeptStudy) -> str:
    """The questions that a study answers, as Markdown: a line for each table that does."""
    lines: dict[str, list[str]] = {}
    for results in study.results:
        for question, answer in _QUESTIONS.get(_subject(study, results), ()) if results.run else ():
            if words := answer(study, results):
                lines.setdefault(question, []).append(f"- {results.title} with {results.backbone}: {words}")
    return "\n\n".join("\n".join([f"## {question}", "", *said]) for question, said in lines.items())


def sizes(results: Results) -> dict[str, int]:
    """Trainable parameters by method."""
    return {name: int(size) for name, size in results.rows.groupby("method")["trainable_parameters"].first().items()}


def _all(study: KeptStudy, results: Results) -> str:
    """Every method against the reference."""
    return _grouped(results, results.against_reference)


def learned_nothing(results: Results, name: str) -> list[int]:
    """Seeds with which a method gives little but the commonest label; none of a measure of which less is better."""
    floor = results.floors.get("majority", {}).get("test") if results.greater_is_better else None
    values = results.values[name]
    return [seed for seed, value in values.items() if floor is not None and value <= floor + _LEARNED_NOTHING]


def _at_once(study: KeptStudy, results: Results) -> str:
    """As `_all`, and which runs learned nothing, since a mean over seeds hides it."""
    said = [_all(study, results)]
    for name, values in results.values.items():
        if lost := learned_nothing(results, name):
            said.append(f"{len(lost)} of {len(values)} runs of {name} give little but the commonest label.")
    return " ".join(said)


def _policy(study: KeptStudy, name: str) -> str | None:
    """Who chooses the guests of a MoLEx."""
    return getattr(study.methods[name], "policy", None)


def _learned(study: KeptStudy) -> str | None:
    """The first method whose guests a router chooses."""
    return next((name for name in study.recipe.names if _policy(study, name) == "learned"), None)


def _controls(study: KeptStudy) -> list[str]:
    return [name for name in study.recipe.names if _policy(study, name) in _CONTROLS]


def _beats_lora(study: KeptStudy, results: Results) -> str | None:
    difference = next((one for one in results.against_reference if one.first == _learned(study)), None)
    return None if difference is None else f"{_sentence(results, difference)} {_sample(results, difference)}"


def _router_matters(study: KeptStudy, results: Results) -> str | None:
    learned = _learned(study)
    differences = results.contrasts([(learned, control) for control in _controls(study)]) if learned else []
    if not differences:
        return None
    return f"{' '.join(_sentence(results, one) for one in differences)} {_sample(results, differences[0])}"


def _resists(study: KeptStudy, results: Results) -> str | None:
    learned = _learned(study)
    others = (results.reference, *_controls(study)) if learned else ()
    losses = study.losses(results, [(str(learned), other) for other in others])
    said = [f"{kind} noise of {strength:g}: {_loss(one)}" for kind, strength, one in losses]
    return "; ".join(said) + "." if said else None


def _loss(one: Contrast) -> str:
    said = f"{one.first} loses {'less' if one.interval.difference < 0 else 'more'} than {one.second}"
    if not one.significant:
        said = f"the losses of {one.first} and {one.second} do not differ significantly"
    return f"{said} ({difference_in_words(one)}, {one.seeds} training seeds)"


def _costs(study: KeptStudy, results: Results) -> str | None:
    learned, lora, costs = _learned(study) or "", results.reference, study.costs(results.backbone)
    if not {learned, lora} <= set(costs):
        return None
    ours, other = costs[learned], costs[lora]
    latency = [measure for measure in ours if measure.startswith("latency ms")]
    slower = [f"{ours[measure] / other[measure]:.2f} at {measure.rpartition(', ')[2]}" for measure in latency]
    trained = sizes(results)
    return (
        f"a training step of {learned} takes {ours['step time']:.2f} times LoRA's time, a forward "
        f"{' and '.join(slower)}"
        f"; it keeps {ours['kept MB'] / other['kept MB']:.2f} times LoRA's memory for the backward pass and trains "
        f"{trained[learned]:,} parameters to LoRA's {trained[lora]:,}."
    )


def _molex_settings(study: KeptStudy, results: Results) -> str:
    ends = results.rows.dropna(subset="alpha_end")
    moved = [_moved(str(name), rows) for name, rows in ends.groupby("method", sort=False)]
    return " ".join([_against_reference(study, results, "molex"), *moved])


def _compositions(study: KeptStudy, results: Results) -> str | None:
    return None if _is_of_settings(study) or _is_kept(results) else _all(study, results)


def _what_is_kept(study: KeptStudy, results: Results) -> str | None:
    return _all(study, results) if _is_kept(results) and not _is_of_settings(study) else None


def _mole_settings(study: KeptStudy, results: Results) -> str | None:
    if not _is_of_settings(study):
        return None
    others = [name for name in study.named("mole") if name != results.reference]
    said = _grouped(results, results.contrasts([(name, results.reference) for name in others]))
    routed = results.rows.dropna(subset="entropy")
    means = [f"{name} {number(nats)}" for name, nats in routed.groupby("method", sort=False)["entropy"].mean().items()]
    return said + (f" Entropy of the weights, in nats: {', '.join(means)}." if means and not _is_kept(results) else "")


def _is_of_settings(study: KeptStudy) -> bool:
    return len(study.named("mole")) > 2


def _is_kept(results: Results) -> bool:
    """Whether a table is about what is kept of each LoRA, not about scores."""
    return results.title.endswith("what is kept")


def _moved(name: str, rows: pd.DataFrame) -> str:
    each = ", ".join(number(value) for value in rows["alpha_end"])
    start, end = (number(float(rows[f"alpha_{when}"].mean())) for when in ("start", "end"))
    return f"{name}: alpha went from {start} to {end} ({each} by seed)."


def _mola_sizes(study: KeptStudy, results: Results) -> str:
    return _against_reference(study, results, "mola")


def _against_reference(study: KeptStudy, results: Results, kind: str) -> str:
    return _grouped(results, [one for one in results.against_reference if one.first in study.named(kind)])


def _along_depth(study: KeptStudy, results: Results) -> str | None:
    depth = study.tables.get("depth")
    if depth is None:
        return None
    said = "the distance between a module's experts, raw and by their size, and what the loss grows by without each"
    return (
        f"{results.reference}, {said}, mean (least to most) of {depth['seed'].nunique()} seeds.\n\n{depth_table(depth)}"
    )


def _shapes(study: KeptStudy, results: Results) -> str | None:
    names = [name for name in study.named("mola") if results.values[name]]
    differences = results.contrasts(list(combinations(names, 2)))
    if not differences:
        return None
    differing = [one for one in differences if one.significant]
    said = " ".join(_sentence(results, one) for one in differing)
    return f"of {len(differences)} pairs of shapes, {len(differing) or 'none'} differ significantly. {said}".strip()


def _sentence(results: Results, one: Contrast) -> str:
    """One difference as a sentence."""
    said = f"{one.first} is {'better' if results.better(one) else 'worse'} than {one.second}"
    if not one.significant:
        said = f"{one.first} and {one.second} do not differ significantly"
    return f"{said} ({difference_in_words(one)})."


def _sample(results: Results, one: Contrast) -> str:
    examples = f"{one.examples:,} test examples" if one.examples > 1 else "no single examples"
    said = f"({results.metric}, {one.seeds} seeds, {examples})"
    floor = results.floors.get("linear", {}).get("test")
    sign = 1 if results.greater_is_better else -1
    below = [
        name for name in (one.first, one.second) if floor is not None and sign * results.means[name] < sign * floor
    ]
    return said + (f" Below the linear floor: {', '.join(below)}." if below else "")


def _grouped(results: Results, differences: Iterable[Contrast]) -> str:
    groups: dict[str, list[str]] = {"better than": [], "worse than": [], "not significantly different from": []}
    for one in differences:
        group = "better than" if results.better(one) else "worse than"
        text = f"{one.first} ({difference_in_words(one)})"
        groups[group if one.significant else "not significantly different from"].append(text)
    said = [f"{words} {results.reference}: {', '.join(names)}" for words, names in groups.items() if names]
    return "; ".join(said) + "." * bool(said)


# What a table is about: several tasks at once, tasks one after the other, or else the kind of method it compares with.
_QUESTIONS: Mapping[str, Sequence[tuple[str, _Answer]]] = {
    "lora": (
        ("Does MoLEx beat LoRA here?", _beats_lora),
        ("Is its learned router better than a random one?", _router_matters),
        ("Does it resist noise better?", _resists),
        ("What does it cost?", _costs),
        ("Does MoLA beat LoRA of the same size here?", _mola_sizes),
        ("Does its shape along the depth matter?", _shapes),
    ),
    "molex": (("Which settings of MoLEx matter?", _molex_settings),),
    "mola": (
        ("Which settings of MoLA matter?", _all),
        ("What do its experts come to along the depth?", _along_depth),
    ),
    "mole": (
        ("Does MOLE beat the other ways to compose LoRAs?", _compositions),
        ("How much of each LoRA is kept?", _what_is_kept),
        ("Which settings of MOLE matter?", _mole_settings),
    ),
    "tasks": (("Does one adapter for several tasks gain by being a mixture?", _at_once),),
    "stages": (("What is kept of tasks that are learned one after the other?", _all),),
}


def _subject(study: KeptStudy, results: Results) -> str:
    if isinstance(study.recipe, Continual):
        return "stages"
    return "tasks" if parts_of(results.task) else study.methods[results.reference].name
