"""What a study found, in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lamella.lab.runs.scoring import selection
from lamella.lab.studies.grid import Grid
from lamella.lab.studies.outcome import Contest, Difference
from lamella.lab.studies.rows import StudyFolder

LEVEL = 0.05


def verdict(contests: Sequence[Contest], grid: Grid) -> str:
    """One paragraph: means, floors, and which methods differ from the reference."""
    return " ".join(_words(contest, grid.reference_name) for contest in contests)


def _words(contest: Contest, reference: str) -> str:
    better = selection(contest.task).greater_is_better
    means = {name: float(np.mean(list(tests.values()))) for name in contest.rows if (tests := contest.tests(name))}
    place = f"{contest.task.name} with {contest.backbone}"
    if not means:
        return f"On {place} nothing was run yet."
    ranked = sorted(means.items(), key=lambda item: item[1], reverse=better)
    seeds = max(len(contest.tests(name)) for name in means)
    text = f"On {len(contest.task.splits['test']):,} test rows of {place}, mean {contest.metric} over {seeds} seed(s): "
    text += ", ".join(f"{name} {mean:.3f}" for name, mean in ranked) + "."
    floors = [
        f"{name.removeprefix('floor ').strip('()')} {scores['test'][contest.metric]:.3f}"
        for name, scores in contest.floors.items()
    ]
    if floors:
        text += f" Floors: {', '.join(floors)}."
    return f"{text} {_against(contest.differences, reference, better)}"


def _against(differences: Sequence[Difference], reference: str, better: bool) -> str:
    if not differences:
        return f"No difference from {reference} was tested."
    groups: dict[str, list[str]] = {"Better": [], "Worse": [], "Not told apart": []}
    for one in differences:
        above = (one.interval.difference > 0) == better
        group = "Not told apart" if one.corrected >= LEVEL else "Better" if above else "Worse"
        groups[group].append(f"{one.method} ({one.interval}, p {one.corrected:.3g})")
    found = [
        f"{words} from {reference}" if words == "Not told apart" else f"{words} than {reference}" for words in groups
    ]
    return " ".join(f"{head}: {', '.join(names)}." for head, names in zip(found, groups.values(), strict=True) if names)


def notes(contests: Sequence[Contest], grid: Grid, folder: StudyFolder) -> list[str]:
    """How the numbers were made, what was made equal, and what was not run."""
    lines = [
        "Methods are paired by seed: the same seed gives the same order of training rows. An interval is a 95 % "
        "bootstrap over test examples and seeds; p is the two-sided bootstrap p-value of the same draws, corrected by "
        f"Holm over the methods of one backbone and task; below {LEVEL:g} a method is called better or worse. With few "
        "seeds a bootstrap over them is somewhat too narrow."
    ]
    lines += [line for contest in contests for line in _budget_notes(contest, grid)]
    for contest in contests:
        for own in contest.cells.values():
            for seed, cell in own.items():
                if contest.rows[cell.method][seed] is None:
                    lines.append(f"Not run: {cell.label}. {folder.failure(cell.key) or ''}".strip())
        lines += [note for note in contest.task.notes if note not in lines]
    return lines


def _budget_notes(contest: Contest, grid: Grid) -> list[str]:
    measured = {
        name: row["metrics"] for name, own in contest.rows.items() if (row := next(filter(None, own.values()), None))
    }
    counts = ", ".join(f"{name} {one['trainable_parameters']:,}" for name, one in measured.items())
    tokens = ", ".join(f"{name} {one['tokens']:,}" for name, one in measured.items())
    lines = []
    if grid.budget == "equal-parameters" and counts:
        lines.append(
            f"Trainable parameters on {contest.backbone}, task head included: {counts}. LoRA's rank and the experts "
            f"of MoLA's shapes were chosen to equal {grid.match}; other methods have the size that they have."
        )
    if grid.budget != "none" and tokens:
        lines.append(f"Training tokens on {contest.task.name} with {contest.backbone}: {tokens}.")
    for name, one in measured.items():
        if "matched_method" in one:
            whose = grid.match or one["matched_method"]
            lines.append(
                f"{name}: rank {one['rank']} was chosen, so that its {one['trainable_parameters']:,} trainable "
                f"parameters come nearest to the {one['matched_parameters']:,} of {whose}."
            )
    return lines
