"""The tables of the benchmark of comparing experts."""

from __future__ import annotations

from lamella.lab.bench.cells import shown, table, verdict
from lamella.lab.bench.results import BenchResult

# What it is measured against: times of the published way over ours.
LEAST_TRAINING = {64: 3.0, 256: 1.6}
LEAST_END_TO_END = 30.0


def flows(result: BenchResult) -> str:
    """What each arm takes."""
    rows = [[case.name, arm.name, arm.what, f"{arm.median_seconds:.3f}"] for case in result.cases for arm in case.arms]
    return table(["case", "arm", "what it is", "seconds"], rows)


def targets(result: BenchResult) -> str:
    """The targets, met or missed."""
    rows = []
    *training, whole = result.cases
    for case, (width, _) in zip(training, result.settings["grids"], strict=True):
        least = LEAST_TRAINING.get(width)
        for arm in ("published", "sequential"):
            found = case.ratio(arm, "batched")
            is_target = arm == "published" and least is not None
            rows.append([
                f"{case.name}: {arm} / batched",
                shown(found),
                f">= {least:.1f}" if is_target else "",
                verdict(found.median >= (least or 0.0)) if is_target else "",
            ])  # fmt: skip
    found = whole.ratio("published flow", "lamella")
    rows.append(
        [
            f"{whole.name}: published flow / lamella", shown(found), f">= {LEAST_END_TO_END:.0f}",
            verdict(found.median >= LEAST_END_TO_END),
        ]
    )  # fmt: skip
    return table(["figure", "measured", "target", ""], rows)
