"""What the table of a study says, in words."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.lab.studies.results import Results
from lamella.statistics import RESAMPLES, SIGNIFICANT

HOW_SURE = (
    "Methods are paired by seed: the same seed gives the same order of training rows. An interval is a 95 % bootstrap "
    f"over test examples and seeds, of {RESAMPLES:,} draws that are the same for all methods of a table; p is "
    f"two-sided, from the same draws, corrected by Holm over the methods of a table; below {SIGNIFICANT:g} a "
    "method is called better or worse. With few seeds a bootstrap over them is somewhat too narrow."
)


def summary(results: Results, shown: Sequence[str]) -> str:
    """One paragraph: means of the methods shown, floors, and which methods differ from the reference.

    Where not all methods are shown there are many, and the table alone says by how much they differ.
    """
    title = results.task if results.title == results.metric else results.title
    place = f"{title} with {results.backbone}"
    if not results.means:
        return f"On {place} nothing was run yet."
    means = [(name, results.means[name]) for name in shown if name in results.means]
    if list(shown) == list(results.names):
        means.sort(key=lambda item: item[1], reverse=results.greater_is_better)
    sizes = [len(one) for own in results.scores.values() for one in own.values()]
    rows = f"{max(sizes):,} test rows of " if sizes and max(sizes) > 1 else ""
    seeds = max(len(own) for own in results.values.values())
    text = f"On {rows}{place}, mean {results.metric} over {seeds} seed(s): "
    text += ", ".join(f"{name} {mean:.3f}" for name, mean in means) + "."
    if floors := [f"{word} {splits['test']:.3f}" for word, splits in results.floors.items() if "test" in splits]:
        text += f" Floors: {', '.join(floors)}."
    return f"{text} {_against_reference(results, figures=list(shown) == list(results.names))}"


def _against_reference(results: Results, *, figures: bool) -> str:
    if not results.against_reference:
        return f"No difference from {results.reference} was tested."
    groups: dict[str, list[str]] = {"Better than": [], "Worse than": [], "Not significantly different from": []}
    for one in results.against_reference:
        head = "Better than" if results.better(one) else "Worse than"
        said = f"{one.first} ({one.interval}, p {one.p_value:.3g})" if figures else one.first
        groups[head if one.significant else "Not significantly different from"].append(said)
    return " ".join(f"{head} {results.reference}: {', '.join(said)}." for head, said in groups.items() if said)
