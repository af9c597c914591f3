"""The tables of MoLEx's benchmark."""

from __future__ import annotations

from lamella.lab.bench.cells import shown, table, verdict
from lamella.lab.bench.molex_arms import BF16, RECOMPUTED
from lamella.lab.bench.results import Arm, BenchResult
from lamella.lab.studies.measuring import Ratio

# What MoLEx is measured against, times plain LoRA of the same rank.
MOST_TIME_PER_RUN = 1.05  # of an exact train step, times the blocks run
MOST_TIME_BF16 = 1.6  # of a train step whose guests run in bfloat16 and never are the block itself
MOST_KEPT_RECOMPUTED = 1.25  # of the activations kept when guests are recomputed


def train_step(result: BenchResult) -> str:
    """What each arm's train step computes, takes and keeps."""
    case = result.cases[0]
    lora = case.arm("lora")
    assert lora.flops is not None
    rows = []
    for arm in case.arms:
        assert arm.flops is not None
        assert arm.block_runs is not None
        time = "1" if arm is lora else shown(case.ratio(arm.name, "lora"))
        counted = f"{arm.block_runs:.3f}", f"{arm.flops / 1e9:.1f}", f"{arm.flops / lora.flops:.3f}"
        kept = f"{arm.kept_mb:.1f}", f"{arm.kept_mb / lora.kept_mb:.3f}"
        peak = [] if arm.peak_mb is None else [f"{arm.peak_mb:.1f}"]
        names = arm.name, arm.what, f"{arm.trainable_parameters:,}"
        rows.append([*names, *counted, f"{arm.median_seconds:.3f}", time, *kept, *peak])
    heads = ["arm", "what it is", "trainable", "blocks run", "GFLOP", "GFLOP / lora", "s per step", "time / lora"]
    heads += ["kept MB", "kept / lora"]
    return table(heads + (["peak MB"] if lora.peak_mb is not None else []), rows)


def inference(result: BenchResult) -> str:
    """Each arm's forward without gradients over plain LoRA's, for every batch and number of threads."""
    cases = result.cases[1:]
    if not cases:
        return "Inference was not timed."
    rows = []
    for arm in cases[0].arms:
        cells = [shown(case.ratio(arm.name, "lora")) for case in cases] if arm.name != "lora" else [
            f"1 ({1e3 * case.arm('lora').median_seconds:.0f} ms)" for case in cases
        ]  # fmt: skip
        rows.append([arm.name, *cells])
    clocks = "; ".join(f"{case.name}: {case.clock}" for case in cases)
    heads = ["forward without gradients, time / lora", *(case.name for case in cases)]
    return f"{table(heads, rows)}\n\nRows of 128 tokens. {clocks}.{_left_out(result)}"


def targets(result: BenchResult) -> str:
    """The targets of the train step, met or missed."""
    case = result.cases[0]
    rows = []
    for arm in filter(_is_exact, case.arms):
        assert arm.block_runs is not None
        rows.append(_of_time(case.ratio(arm.name, "lora"), MOST_TIME_PER_RUN * arm.block_runs))
    rows.append(_of_time(case.ratio(BF16, "lora"), MOST_TIME_BF16))
    kept = case.arm(RECOMPUTED).kept_mb / case.arm("lora").kept_mb
    words = f"activations kept, {RECOMPUTED} / lora", f"{kept:.3f}", f"<= {MOST_KEPT_RECOMPUTED:.3f}"
    rows.append([*words, verdict(kept <= MOST_KEPT_RECOMPUTED)])
    others = [ratio for ratio in case.ratios if ratio.over != "lora"]
    rows += [[f"train step, {ratio.arm} / {ratio.over}", shown(ratio), "", ""] for ratio in others]
    return table(["figure", "measured", "target", ""], rows)


def _of_time(ratio: Ratio, most: float) -> list[str]:
    words = f"train step, {ratio.arm} / {ratio.over}", shown(ratio), f"<= {most:.3f}"
    return [*words, verdict(ratio.median <= most)]


def _is_exact(arm: Arm) -> bool:
    return arm.name.startswith("molex") and arm.name not in (BF16, RECOMPUTED)


def _left_out(result: BenchResult) -> str:
    asked = result.settings["inference_threads"] if result.settings["device"] == "cpu" else []
    left_out = [threads for threads in asked if threads > result.machine["cores"]]
    if not left_out:
        return ""
    return (
        f" Not timed with {', '.join(map(str, left_out))} threads: the machine has {result.machine['cores']} core(s)."
    )
