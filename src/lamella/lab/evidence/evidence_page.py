"""docs/evidence.md: what the kept studies say, in sentences and tables that follow from their figures alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from lamella.lab.evidence.evidence import RESAMPLES, Contrast, KeptStudy, Standing
from lamella.lab.evidence.similarity_evidence import KeptSimilarity, similarity_section
from lamella.lab.methods import Method
from lamella.lab.studies.composition.study import kept

_NOT_RUN = "*not run*"
_CONTROLS = ("random", "fixed", "self", "uniform")

_HEAD = f"""# Evidence

What was trained, what came of it, and what was not run. `lamella evidence` writes this page from the rows in
[results/studies](results/studies); a test fails when the two differ. A study is one packaged recipe: `lamella compare
NAME` runs it, `lamella evidence --add runs/NAME` keeps it here.

How to read it:

- A *cell* is one training run: a backbone, a task, a method, a seed. A seed orders the training rows alike for every
  method.
- Square brackets hold 95 % intervals: paired bootstrap over test examples and seeds, the same on both sides,
  {RESAMPLES:,} draws. Where the metric is no mean over examples only seeds are drawn. With few seeds such intervals are
  too narrow.
- p is two-sided, from the same draws, corrected by Holm: over the methods of a table, or over the comparisons of an
  answer. Below 0.05 a method is called better or worse; *not told apart* does not mean equal.
- Noise is put on the test inputs by `lamella evaluate --noise`, given a study's runs, with -o in its folder `noise`.
  What it takes away is the clean score less the noisy one; training seeds and draws of the noise are resampled.
- The floors are TF-IDF with a linear model, and the commonest training label; of options, chance and the commonest
  answer of the tested rows.
- Parameters include the task head. A step's time is that of the reference's in one interleaved run of untrained models,
  with one thread; empty where it was not measured. `docs/performance.md` says more of cost.
"""


def evidence_page(studies: Sequence[KeptStudy], similarity: Sequence[KeptSimilarity] = ()) -> str:
    """The page of these studies, and of these of expert similarity, as Markdown."""
    standings = [standing for study in studies for standing in study.standings]
    against_lora = [one for one in standings if one.methods[one.reference].name == "lora"]
    routed = [one for one in against_lora if _learned(one)]
    mixtures = [one for one in against_lora if _named(one, "mola")]
    shaped = [one for one in mixtures if len(_named(one, "mola")) > 1]
    settings = [one for one in standings if one.methods[one.reference].name == "molex"]
    controlled = [one for one in routed if _controls(one)]
    composed = [
        one
        for study in studies
        for one in study.standings
        if one.methods[one.reference].name == "mole" and one.task not in study.parts
    ]
    tuned = [one for one in composed if len(_named(one, "mole")) > 2]
    composed = [one for one in composed if one not in tuned]
    parts = [
        _HEAD,
        _planned(studies),
        "## MoLEx: pretrained layers as experts",
        _answers("Does MoLEx beat LoRA here?", routed, _beats_lora),
        _answers("Is its learned router better than a random one?", controlled, _router_worth),
        _answers("Does it resist noise better?", routed, _resists),
        _answers("What does it cost?", routed, _costs),
        _answers("Which of its settings matter?", settings, _molex_settings),
        "## MoLA: layer-wise LoRA experts",
        _answers("Does MoLA beat LoRA of the same size here?", mixtures, _mola_sizes),
        _answers("Does its shape along the depth matter?", shaped, _shapes),
        "## MOLE: trained LoRAs, composed",
        _answers("Does it beat the other ways to compose them?", [one for one in composed if not kept(one)], _all),
        _answers("How much of each LoRA is kept?", [one for one in composed if kept(one)], _all),
        _answers("Which of its settings matter?", tuned, _mole_settings),
        similarity_section(similarity),
        "## The studies",
        *map(_study, studies),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _all(standing: Standing) -> str:
    """Every method against the reference."""
    return _grouped(standing, standing.against_reference)


def _answers(question: str, standings: Sequence[Standing], answer: Callable[[Standing], str]) -> str:
    lines = [f"- {_place(one)}: {answer(one) if one.run else _NOT_RUN}" for one in standings]
    if not lines:  # no packaged study asks it
        return ""
    return "\n".join([f"### {question}", "", *lines])


def _place(standing: Standing) -> str:
    return f"{standing.task} with {standing.backbone} (`{standing.study}`)"


def _named(standing: Standing, kind: str) -> list[str]:
    return [name for name, method in standing.methods.items() if method.name == kind]


def _policy(method: Method) -> str | None:
    return getattr(method, "policy", None) if method.name == "molex" else None


def _learned(standing: Standing) -> str | None:
    """The first MoLEx method whose router learns."""
    return next((name for name, method in standing.methods.items() if _policy(method) == "learned"), None)


def _controls(standing: Standing) -> list[str]:
    return [name for name, method in standing.methods.items() if _policy(method) in _CONTROLS]


def _beats_lora(standing: Standing) -> str:
    own = next((one for one in standing.against_reference if one.first == _learned(standing)), None)
    return _NOT_RUN if own is None else f"{_verdict(standing, own)} {_sample(standing, own)}"


def _router_worth(standing: Standing) -> str:
    learned = _learned(standing) or ""
    found = standing.contrasts([(learned, control) for control in _controls(standing)])
    missing = [name for name in _controls(standing) if name not in {one.second for one in found}]
    said = [_verdict(standing, one) for one in found] + [f"{name}: {_NOT_RUN}." for name in missing]
    return " ".join(said) + (f" {_sample(standing, found[0])}" if found else "")


def _resists(standing: Standing) -> str:
    learned, lora = _learned(standing) or "", standing.reference
    losses = standing.losses([(learned, other) for other in (lora, *_controls(standing))])
    said = [f"{kind} noise of {strength:g}: {_loss(one)}" for kind, strength, one in losses]
    return "; ".join(said) + "." if said else _NOT_RUN


def _loss(one: Contrast) -> str:
    said = f"{one.first} loses {'less' if one.interval.difference < 0 else 'more'} than {one.second}"
    if not one.told_apart:
        said = f"the losses of {one.first} and {one.second} are not told apart"
    return f"{said} ({_difference(one)}, {one.seeds} training seeds)"


def _costs(standing: Standing) -> str:
    learned, lora = _learned(standing) or "", standing.reference
    if not {learned, lora} <= set(standing.costs):
        return _NOT_RUN
    own, other = standing.costs[learned], standing.costs[lora]
    latency = [measure for measure in own if measure.startswith("latency ms")]
    slower = [f"{own[measure] / other[measure]:.2f} at {measure.rpartition(', ')[2]}" for measure in latency]
    return (
        f"a training step of {learned} takes {own['step time']:.2f} times LoRA's time, a forward {' and '.join(slower)}"
        f"; it keeps {own['kept MB'] / other['kept MB']:.2f} times LoRA's memory for the backward pass and trains "
        f"{standing.sizes[learned]:,} parameters to LoRA's {standing.sizes[lora]:,}."
    )


def _molex_settings(standing: Standing) -> str:
    moved = [_moved(name, ends) for name, ends in standing.alphas.items()]
    return " ".join([_against_reference(standing, "molex"), *moved])


def _mole_settings(standing: Standing) -> str:
    own = [name for name in _named(standing, "mole") if name != standing.reference]
    said = _grouped(standing, standing.contrasts([(name, standing.reference) for name in own]))
    missing = [f" {name}: {_NOT_RUN}." for name in own if not standing.tests[name]]
    means = [f"{name} {_number(float(np.mean(nats)))}" for name, nats in standing.entropies.items()]
    entropy = f" Entropy of the weights, in nats: {', '.join(means)}." if means and not kept(standing) else ""
    return said + "".join(missing) + entropy


def _moved(name: str, ends: Sequence[tuple[float, float]]) -> str:
    start, end = (np.mean([one[at] for one in ends]) for at in (0, 1))
    each = ", ".join(_number(one[1]) for one in ends)
    return f"{name}: alpha went from {_number(float(start))} to {_number(float(end))} ({each} by seed)."


def _mola_sizes(standing: Standing) -> str:
    return _against_reference(standing, "mola")


def _against_reference(standing: Standing, kind: str) -> str:
    shown = [one for one in standing.against_reference if standing.methods[one.first].name == kind]
    missing = [name for name in _named(standing, kind) if not standing.tests[name]]
    return (_grouped(standing, shown) if shown else "") + "".join(f" {name}: {_NOT_RUN}." for name in missing)


def _shapes(standing: Standing) -> str:
    names = [name for name in _named(standing, "mola") if standing.tests[name]]
    pairs = [(first, second) for at, first in enumerate(names) for second in names[at + 1 :]]
    found = standing.contrasts(pairs)
    if not found:
        return _NOT_RUN
    apart = [one for one in found if one.told_apart]
    said = " ".join(_verdict(standing, one) for one in apart)
    return f"of {len(found)} pairs of shapes, {len(apart) or 'none'} are told apart. {said}".strip()


def _verdict(standing: Standing, one: Contrast) -> str:
    """One difference as a sentence."""
    better = (one.interval.difference > 0) == standing.greater_is_better
    said = f"{one.first} is {'better' if better else 'worse'} than {one.second}"
    return f"{said if one.told_apart else f'{one.first} and {one.second} are not told apart'} ({_difference(one)})."


def _difference(one: Contrast) -> str:
    return f"{_interval(one)}, p {_p(one.p_value)}"


def _interval(one: Contrast) -> str:
    return (
        f"{_number(one.interval.difference, '+')} [{_number(one.interval.low, '+')}, {_number(one.interval.high, '+')}]"
    )


def _sample(standing: Standing, one: Contrast) -> str:
    examples = f"{one.examples:,} test examples" if one.examples > 1 else "no single examples"
    said = f"({standing.metric}, {one.seeds} seeds, {examples})"
    floor = standing.floors.get("linear")
    means = {name: _mean(standing.tests[name]) for name in (one.first, one.second)}
    sign = 1 if standing.greater_is_better else -1
    below = [name for name, mean in means.items() if floor is not None and sign * mean < sign * floor]
    return said + (f" Below the linear floor: {', '.join(below)}." if below else "")


def _mean(tests: Mapping[int, float]) -> float:
    return float(np.mean(list(tests.values())))


def _grouped(standing: Standing, found: Iterable[Contrast]) -> str:
    groups: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
    for one in found:
        better = (one.interval.difference > 0) == standing.greater_is_better
        group = "not told apart from" if not one.told_apart else "better than" if better else "worse than"
        groups[group].append(f"{one.first} ({_difference(one)})")
    said = [f"{words} {standing.reference}: {', '.join(names)}" for words, names in groups.items() if names]
    return "; ".join(said) + "."


def _planned(studies: Sequence[KeptStudy]) -> str:
    rows = []
    for study in studies:
        places = ", ".join(f"{one.task} with {one.backbone}" for one in study.standings)
        rows.append([f"`{study.name}`", places, f"{study.run} / {study.planned}" if study.run else _NOT_RUN])
    return "## Run and planned\n\n" + _table(["study", "where", "cells run / planned"], rows)


def _study(study: KeptStudy) -> str:
    parts = [f"### {study.name}", f"{study.run} of {study.planned} cells run."] if study.run else [f"### {study.name}"]
    parts += [*(f"On {machine}." for machine in study.machines), *study.remarks]
    for standing in study.standings:
        if len(study.standings) > 1:
            parts.append(f"#### {standing.task} with {standing.backbone}")
        parts.append(_results(standing))
    return "\n\n".join(parts)


def _results(standing: Standing) -> str:
    if not standing.run:
        return f"{_NOT_RUN}: {', '.join(standing.methods)}; {len(standing.seeds)} seeds."
    heads = ["method", "run", *(f"seed {seed}" for seed in standing.seeds), "mean", f"minus {standing.reference}", "p"]
    heads += ["trainable", "step time"]
    blank = [""] * 4
    rows = [
        [f"floor ({word})", "", *[_number(value)] * len(standing.seeds), _number(value), *blank]
        for word, value in standing.floors.items()
    ]
    found = {one.first: one for one in standing.against_reference}
    rows += [_row(standing, name, found.get(name)) for name in standing.methods]
    return f"Test {standing.metric}.\n\n{_table(heads, rows)}"


def _row(standing: Standing, name: str, found: Contrast | None) -> list[str]:
    tests = standing.tests[name]
    seeds = [_number(tests[seed]) if seed in tests else _NOT_RUN for seed in standing.seeds]
    mean = _number(_mean(tests)) if tests else _NOT_RUN
    difference, p_value = ("reference" if name == standing.reference else "", "")
    if found is not None:
        difference, p_value = _interval(found), _p(found.p_value)
    size = f"{standing.sizes[name]:,}" if name in standing.sizes else ""
    time = f"{standing.costs[name]['step time']:.2f}" if name in standing.costs else ""
    return [name, f"{len(tests)} / {len(standing.seeds)}", *seeds, mean, difference, p_value, size, time]


def _number(value: float, sign: str = "") -> str:
    # halves of the last digit, which shares of examples often are, must not hang on the last bit
    return f"{round(value, 9) + 0.0:{sign}.3f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
