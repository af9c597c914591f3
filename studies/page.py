"""docs/evidence.md: what the kept studies say, in sentences and tables that follow from their figures alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import pandas as pd

from lamella.lab.data.derived import parts_of
from lamella.lab.studies.composition_results import masking_table, remarks
from lamella.lab.studies.continual import Continual
from lamella.lab.studies.results import Results
from lamella.statistics import RESAMPLES, Contrast
from studies.depth import depth_table
from studies.keep import KeptStudy
from studies.similarity import KeptSimilarity, similarity_section
from studies.tables import markdown

_NOT_RUN = "*not run*"
_LEARNED_NOTHING = 0.02  # above the commonest label, in accuracy
_CONTROLS = ("random", "fixed", "self", "uniform")

_HEAD = f"""# Evidence

What was trained, and what came of it. `make evidence` writes this page from [studies/rows](../studies/rows); a test
fails when the two differ. A study is one recipe in [studies/recipes](../studies/recipes), or a packaged one:
`lamella compare studies/recipes/NAME.yaml` runs it, `python -m studies --add runs/NAME` keeps it here.

How to read it:

- A *cell* is one training run: a backbone, a task, a method, a seed. A seed orders the training rows alike for every
  method.
- Square brackets hold 95 % intervals: paired bootstrap over test examples and seeds, the same on both sides and for all
  methods of a table, {RESAMPLES:,} draws. Where the metric is not a mean over examples only seeds are drawn. With few
  seeds such intervals are too narrow.
- What is not significant is undecided: the study cannot tell differences smaller than about half an interval's width.
- p is two-sided, from the same draws, corrected by Holm: over the methods of a table, or over the comparisons of an
  answer. Below 0.05 a method is called better or worse; *not significant* does not mean equal.
- Noise is put on the test inputs by `lamella evaluate --noise`, given a study's runs, with -o in its folder `noise`.
  What it takes away is the clean score less the noisy one; training seeds and draws of the noise are resampled.
- The floors are TF-IDF with a linear model, and the commonest training label; of options, chance and the commonest
  answer of the tested rows.
- Parameters include the task head. A step's time is that of the reference's in one interleaved run of untrained models,
  with one thread; empty where it was not measured. `docs/performance.md` says more of cost.
- A question is answered only from what was run. What was planned and not run is in the first table alone.
"""


Asked = tuple[KeptStudy, Results]


def evidence_page(studies: Sequence[KeptStudy], similarity: Sequence[KeptSimilarity] = (), criteria: str = "") -> str:
    """The page of these studies, of these of expert similarity, and of criteria of compression, as Markdown."""
    run = [(study, table) for study in studies for table in study.results if table.run]
    staged = [one for one in run if isinstance(one[0].recipe, Continual)]
    together = [one for one in run if parts_of(one[1].task) and one not in staged]
    tables = [one for one in run if not one[1].part and one not in staged and one not in together]
    against_lora = [one for one in tables if _reference_kind(one) == "lora"]
    routed = [one for one in against_lora if _learned(one[0])]
    mixtures = [one for one in against_lora if one[0].named("mola")]
    shaped = [one for one in mixtures if len(one[0].named("mola")) > 1]
    controlled = [one for one in routed if _controls(one[0])]
    settings = [one for one in tables if _reference_kind(one) == "molex"]
    allocated = [one for one in tables if _reference_kind(one) == "mola"]
    composed = [one for one in tables if _reference_kind(one) == "mole"]
    tuned = [one for one in composed if len(one[0].named("mole")) > 2]
    composed = [one for one in composed if one not in tuned]
    parts = [
        _HEAD,
        _planned(studies),
        "## MoLEx: pretrained layers as experts",
        _answers("Does MoLEx beat LoRA here?", routed, _beats_lora),
        _answers("Is its learned router better than a random one?", controlled, _router_matters),
        _answers("Does it resist noise better?", routed, _resists),
        _answers("What does it cost?", routed, _costs),
        _answers("Which of its settings matter?", settings, _molex_settings),
        "## MoLA: layer-wise LoRA experts",
        _answers("Does MoLA beat LoRA of the same size here?", mixtures, _mola_sizes),
        _answers("Does its shape along the depth matter?", shaped, _shapes),
        _answers("Which of its settings matter?", allocated, _all),
        _answers("What do its experts come to along the depth?", allocated, _along_depth),
        "## MOLE: trained LoRAs, composed",
        _answers("Does it beat the other ways to compose them?", [one for one in composed if not _kept(one[1])], _all),
        _answers("How much of each LoRA is kept?", [one for one in composed if _kept(one[1])], _all),
        _answers("Which of its settings matter?", tuned, _mole_settings),
        "## Several tasks" if together or staged else "",
        _answers("Does one adapter for several tasks gain by being a mixture?", together, _at_once),
        _answers("What is kept of tasks that are learned one after the other?", staged, _all),
        similarity_section(similarity),
        criteria,
        "## The studies",
        *(_study(study) for study in studies if study.run),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _reference_kind(one: Asked) -> str:
    study, results = one
    return study.methods[results.reference].name


def _kept(results: Results) -> bool:
    """Whether a table is about what is kept of each LoRA, not about scores."""
    return results.title.endswith("what is kept")


def _all(study: KeptStudy, results: Results) -> str:
    """Every method against the reference."""
    return _grouped(results, results.against_reference)


def _at_once(study: KeptStudy, results: Results) -> str:
    """As `_all`, and which runs learned nothing, since a mean over seeds hides it."""
    floor = results.floors.get("majority", {}).get("test")
    said = [_all(study, results)]
    for name, values in results.values.items():
        lost = [seed for seed, value in values.items() if floor is not None and value <= floor + _LEARNED_NOTHING]
        if lost:
            said.append(f"{len(lost)} of {len(values)} runs of {name} give little but the commonest label.")
    return " ".join(said)


def _answers(question: str, asked: Sequence[Asked], answer: Callable[[KeptStudy, Results], str | None]) -> str:
    """The question and a line for each table that answers it; nothing where none does."""
    answers = [(study, results, answer(study, results)) for study, results in asked]
    lines = [
        f"- {results.title} with {results.backbone} (`{study.name}`): {said}"
        for study, results, said in answers
        if said
    ]
    return "\n".join([f"### {question}", "", *lines]) if lines else ""


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
    learned = _learned(study) or ""
    differences = results.contrasts([(learned, control) for control in _controls(study)])
    return (
        f"{' '.join(_sentence(results, one) for one in differences)} {_sample(results, differences[0])}"
        if differences
        else None
    )


def _resists(study: KeptStudy, results: Results) -> str | None:
    learned = _learned(study) or ""
    losses = study.losses(results, [(learned, other) for other in (results.reference, *_controls(study))])
    said = [f"{kind} noise of {strength:g}: {_loss(one)}" for kind, strength, one in losses]
    return "; ".join(said) + "." if said else None


def _loss(one: Contrast) -> str:
    said = f"{one.first} loses {'less' if one.interval.difference < 0 else 'more'} than {one.second}"
    if not one.significant:
        said = f"the losses of {one.first} and {one.second} do not differ significantly"
    return f"{said} ({_difference(one)}, {one.seeds} training seeds)"


def _costs(study: KeptStudy, results: Results) -> str | None:
    learned, lora, costs = _learned(study) or "", results.reference, study.costs(results.backbone)
    if not {learned, lora} <= set(costs):
        return None
    ours, other = costs[learned], costs[lora]
    latency = [measure for measure in ours if measure.startswith("latency ms")]
    slower = [f"{ours[measure] / other[measure]:.2f} at {measure.rpartition(', ')[2]}" for measure in latency]
    sizes = _sizes(results)
    return (
        f"a training step of {learned} takes {ours['step time']:.2f} times LoRA's time, a forward "
        f"{' and '.join(slower)}"
        f"; it keeps {ours['kept MB'] / other['kept MB']:.2f} times LoRA's memory for the backward pass and trains "
        f"{sizes[learned]:,} parameters to LoRA's {sizes[lora]:,}."
    )


def _sizes(results: Results) -> dict[str, int]:
    """Trainable parameters by method."""
    return {name: int(size) for name, size in results.rows.groupby("method")["trainable_parameters"].first().items()}


def _molex_settings(study: KeptStudy, results: Results) -> str:
    ends = results.rows.dropna(subset="alpha_end")
    moved = [_moved(str(name), rows) for name, rows in ends.groupby("method", sort=False)]
    return " ".join([_against_reference(study, results, "molex"), *moved])


def _mole_settings(study: KeptStudy, results: Results) -> str:
    others = [name for name in study.named("mole") if name != results.reference]
    said = _grouped(results, results.contrasts([(name, results.reference) for name in others]))
    routed = results.rows.dropna(subset="entropy")
    means = [f"{name} {_number(nats)}" for name, nats in routed.groupby("method", sort=False)["entropy"].mean().items()]
    return said + (f" Entropy of the weights, in nats: {', '.join(means)}." if means and not _kept(results) else "")


def _moved(name: str, rows: pd.DataFrame) -> str:
    each = ", ".join(_number(value) for value in rows["alpha_end"])
    start, end = (_number(float(rows[f"alpha_{when}"].mean())) for when in ("start", "end"))
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
    return f"{said} ({_difference(one)})."


def _difference(one: Contrast) -> str:
    return f"{_interval(one)}, p {_p(one.p_value)}"


def _interval(one: Contrast) -> str:
    return (
        f"{_number(one.interval.difference, '+')} [{_number(one.interval.low, '+')}, {_number(one.interval.high, '+')}]"
    )


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
        text = f"{one.first} ({_difference(one)})"
        groups[group if one.significant else "not significantly different from"].append(text)
    said = [f"{words} {results.reference}: {', '.join(names)}" for words, names in groups.items() if names]
    return "; ".join(said) + "." * bool(said)


def _planned(studies: Sequence[KeptStudy]) -> str:
    rows = []
    for study in studies:
        tables = [table for table in study.recipe.tables if not table.title.endswith("what is kept")]
        places = ", ".join(dict.fromkeys(f"{one.task} with {one.backbone}" for one in tables))
        rows.append([f"`{study.name}`", places, f"{study.run} / {study.planned}" if study.run else _NOT_RUN])
    return "## Run and planned\n\n" + markdown(["study", "where", "cells run / planned"], rows)


def _study(study: KeptStudy) -> str:
    parts = [f"### {study.name}", f"{study.run} of {study.planned} cells run."]
    parts += [f"On {machine}." for machine in study.machines]
    parts += remarks(study.tables) if "interference" in study.tables else []
    if "masked" in study.tables:
        parts.append(markdown(*masking_table(study.tables["masked"], study.tables["examples"])))
    for results in study.results:
        if results.run:
            parts += [f"#### {results.title} with {results.backbone}"] * (len(study.results) > 1) + [_table(results)]
    return "\n\n".join(parts)


def _table(results: Results) -> str:
    heads = ["method", "run", *(f"seed {seed}" for seed in results.seeds), "mean", f"minus {results.reference}", "p"]
    seeds = len(results.seeds)
    rows = [
        [f"floor ({word})", "", *[_number(splits["test"])] * (seeds + 1), "", "", ""]
        for word, splits in results.floors.items()
    ]
    differences = {one.first: one for one in results.against_reference}
    sizes = _sizes(results)
    rows += [[*_row(results, name, differences.get(name)), f"{sizes[name]:,}"] for name in results.means]
    missing = [name for name in results.names if name not in results.means]
    parts = [f"Test {results.metric}.", markdown([*heads, "trainable"], rows)]
    return "\n\n".join([*parts, *[f"Not run: {', '.join(missing)}."] * bool(missing)])


def _row(results: Results, name: str, contrast: Contrast | None) -> list[str]:
    values = results.values[name]
    seeds = [_number(values[seed]) if seed in values else "" for seed in results.seeds]
    difference, p_value = ("reference" if name == results.reference else "", "")
    if contrast is not None:
        difference, p_value = _interval(contrast), _p(contrast.p_value)
    return [name, f"{len(values)} / {len(results.seeds)}", *seeds, _number(results.means[name]), difference, p_value]


def _number(value: float, sign: str = "") -> str:
    # halves of the last digit, which shares of examples often are, must not hang on the last bit
    return f"{round(value, 9) + 0.0:{sign}.3f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
