"""What the tables of a study say, in words: a verdict first, then who else did better or worse."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from lamella.lab.studies.results import Results
from lamella.statistics import RESAMPLES, SIGNIFICANT, Contrast

HOW_SURE = (
    "Methods are paired by seed: the same seed gives the same order of training rows. An interval is a 95 % bootstrap "
    f"over test examples and seeds, of {RESAMPLES:,} draws that are the same for all methods of a table; p is "
    f"two-sided, from the same draws, corrected by Holm over the methods of a table; below {SIGNIFICANT:g} a "
    "method is called better or worse. With few seeds a bootstrap over them is somewhat too narrow."
)
MATTERS = 0.01  # a difference in the metric's own unit; where one as large is not excluded, nothing is decided
_NAMED = 6  # methods named in a line, before it only counts them
_SAME_SIZE = 0.05


def summary(tables: Sequence[Results], listed: Sequence[str], mixtures: Collection[str]) -> str:
    """Three lines at most: the verdict on the first table, how the others differ there, and the verdicts elsewhere.

    Args:
        tables: of a study, the one that it is about first.
        listed: the methods that its recipe names itself.
        mixtures: those of them that the study asks about.
    """
    first, *others = tables
    if not first.means:
        return f"On {_place(first)} nothing was run yet."
    pair = question(first, listed, mixtures)
    if pair is None:
        return f"On {_place(first)} only {', '.join(first.means)} was run: {_score(first, next(iter(first.means)))}."
    elsewhere: dict[str, list[str]] = {}
    for table in others:
        if set(pair) <= set(table.means):
            elsewhere.setdefault(_outcome(table, table.contrasts([pair])), []).append(table.title)
    lines = [_below_floor(first, listed) + verdict(first, pair), _others(first)]
    if elsewhere:
        said = "; ".join(f"{word} on {', '.join(titles)}" for word, titles in elsewhere.items())
        lines.append(f"Elsewhere {pair[0]} against {pair[1]} is {said}.")
    return "\n".join(lines)


def _below_floor(results: Results, listed: Sequence[str]) -> str:
    """Says so where no method reaches the linear floor, and what that means for the verdict behind it."""
    floor = results.floors.get("linear", {}).get("test")
    run = [results.means[name] for name in listed if name in results.means]
    if floor is None or not results.greater_is_better or max(run) >= floor:
        return ""
    best = max(results.means, key=lambda name: results.means[name])
    if results.means[best] >= floor:  # a control that has seen more rows
        return (
            f"Of what is compared nothing reaches the linear floor of {floor:.3f} on {_place(results)}; "
            f"{best} does, {results.metric} {results.means[best]:.3f}. "
        )
    return (
        f"No method reaches the linear floor of {floor:.3f} on {_place(results)}: all learned too little for a "
        "comparison to say much. Train longer, as with run.epochs=5 or a larger run.max_steps, or at another run.lr. "
    )


def question(results: Results, listed: Sequence[str], mixtures: Collection[str]) -> tuple[str, str] | None:
    """Which two methods the verdict is about: a mixture and what it has to beat; None where fewer than two were run.

    The mixture with the best validation score, against the reference. Where the reference is the mixture, it has to
    beat the best of what is no mixture.
    """
    run = [name for name in listed if name in results.means]
    asked, others = ([name for name in run if (name in mixtures) is wanted] for wanted in (True, False))
    reference = results.reference
    if reference not in results.means:
        return None
    if reference in asked:
        rivals = others or [name for name in run if name != reference]
        return (reference, _best(results, rivals)) if rivals else None
    candidates = [name for name in asked or run if name != reference]
    return (_best(results, candidates), reference) if candidates else None


def _best(results: Results, names: Sequence[str]) -> str:
    """By the validation rows, or by the test rows where not all have any."""
    scores: Mapping[str, float] = {
        name: float(np.mean(list(results.validation[name].values()))) for name in names if results.validation[name]
    }
    if len(scores) < len(names):
        scores = results.means
    return max(names, key=lambda name: scores[name] if results.greater_is_better else -scores[name])


def verdict(results: Results, pair: tuple[str, str]) -> str:
    """Whether the first of two methods is better than the second, in one sentence with its figures."""
    mixture, other = pair
    place = _place(results)
    figures = f"{_score(results, mixture)} against {_score(results, other)}"
    if _same_size(results, pair):
        figures += " of the same size"
    found = results.contrasts([pair])
    if not found:
        return f"On {place} nothing is decided: {figures}; of one number each no interval can be told."
    one = found[0]
    low, high = (f"{bound:+.3f}" for bound in (one.interval.low, one.interval.high))
    figures += f" (difference {one.interval.difference:+.3f}, 95 % interval {low} to {high})"
    match _outcome(results, found):
        case "better":
            return f"On {place} {mixture} is better than {other}: {figures}."
        case "undecided":
            return f"On {place} it is undecided whether {mixture} is better than {other}: {figures}. {_needed(one)}"
        case _:
            return f"On {place} {mixture} does not earn its cost: {figures}."


def _outcome(results: Results, found: Sequence[Contrast]) -> str:
    """Better, worse, undecided where a difference that matters is not excluded or none was tested, else no better."""
    if not found:
        return "undecided"
    one = found[0]
    if one.significant:
        return "better" if results.better(one) else "worse"
    most = one.interval.high if results.greater_is_better else -one.interval.low
    return "undecided" if most >= MATTERS else "no better"


def _needed(one: Contrast) -> str:
    """How many seeds would tell the difference that matters, if an interval shrinks with the root of their number."""
    half = (one.interval.high - one.interval.low) / 2
    seeds = math.ceil(one.seeds * (half / MATTERS) ** 2)
    return (
        f"A difference of {MATTERS} would take some {seeds} seeds instead of {one.seeds}, and as many more test rows."
    )


def _others(results: Results) -> str:
    """Rows, seeds and floors, and which methods differ from the reference; figures are in the table."""
    sizes = [len(one) for own in results.scores.values() for one in own.values()]
    rows = [f"{max(sizes):,} test rows"] if sizes and max(sizes) > 1 else []
    said = ", ".join([*rows, f"{max(len(own) for own in results.values.values())} seed(s)"]) + "."
    if floors := [f"{word} {splits['test']:.3f}" for word, splits in results.floors.items() if "test" in splits]:
        said += f" Floors: {', '.join(floors)}."
    groups: dict[str, list[str]] = {"better": [], "worse": [], "not significantly different": []}
    for one in results.against_reference:
        word = "better" if results.better(one) else "worse"
        groups[word if one.significant else "not significantly different"].append(one.first)
    differing = "; ".join(f"{word} {_named(names)}" for word, names in groups.items() if names)
    return f"{said} Against {results.reference}: {differing}." if differing else said


def _named(names: Sequence[str]) -> str:
    left = len(names) - _NAMED
    return ", ".join(names) if left <= 1 else f"{', '.join(names[:_NAMED])} and {left} more"


def _place(results: Results) -> str:
    title = results.task if results.title == results.metric else results.title
    return f"{title} with {results.backbone}"


def _score(results: Results, name: str) -> str:
    return f"{name} {results.metric} {results.means[name]:.3f}"


def _same_size(results: Results, pair: tuple[str, str]) -> bool:
    sizes = results.rows.groupby("method")["trainable_parameters"].first()
    first, second = (sizes.get(name, 0) or 0 for name in pair)
    return bool(second) and abs(first / second - 1) <= _SAME_SIZE
