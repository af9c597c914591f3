"""The tables of MOLE's benchmark."""

from __future__ import annotations

from lamella.lab.bench.cells import shown, table, verdict
from lamella.lab.bench.results import BenchResult, Case

# What MOLE is measured against: times of PEFT's loop over ours by token, ours with one weight over the frozen layer.
LEAST_GAIN = {8: 2.0, 32: 3.3}
MOST_TIME = {8: 1.15, 32: 1.45}
MOST_PEAK = 1.05  # of the smallest number of LoRAs


def layer(result: BenchResult) -> str:
    """What each arm takes and keeps, for every number of LoRAs."""
    rows = []
    for case in result.cases:
        for arm in case.arms:
            time = "1" if arm.name == "frozen" else shown(case.ratio(arm.name, "frozen"))
            memory = [f"{arm.kept_mb:.2f}", f"{arm.peak_mb:.1f}" if arm.peak_mb is not None else ""]
            rows.append([case.name, arm.name, arm.what, f"{1e3 * arm.median_seconds:.1f}", time, *memory])
    heads = ["LoRAs", "arm", "what it is", "ms", "time / frozen", "kept MB", "peak MB"]
    return table(heads, rows)


def targets(result: BenchResult) -> str:
    """The targets of the layer, met or missed."""
    rows = []
    for case, num_loras in zip(result.cases, result.settings["num_loras"], strict=True):
        rows += _times(case, num_loras)
    first, *others = result.cases
    for case in others:
        for arm in ("mole, by token", "mole, one weight"):
            peak, least = case.arm(arm).peak_mb, first.arm(arm).peak_mb
            assert peak is not None
            assert least is not None
            words = f"{case.name}: peak memory, {arm} / the same at {first.name}"
            rows.append([words, f"{peak / least:.3f}", f"<= {MOST_PEAK:.2f}", verdict(peak / least <= MOST_PEAK)])
    return table(["figure", "measured", "target", ""], rows)


def _times(case: Case, num_loras: int) -> list[list[str]]:
    by_token, once = case.ratio("loop, by token", "mole, by token"), case.ratio("mole, one weight", "frozen")
    least, most = LEAST_GAIN.get(num_loras), MOST_TIME.get(num_loras)
    return [
        [
            f"{case.name}: loop / mole, by token",
            shown(by_token),
            f">= {least:.2f}" if least else "",
            verdict(by_token.median >= least) if least else "",
        ],
        [
            f"{case.name}: mole / frozen, one weight",
            shown(once),
            f"<= {most:.2f}" if most else "",
            verdict(once.median <= most) if most else "",
        ],
    ]
