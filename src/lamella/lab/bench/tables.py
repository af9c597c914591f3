"""A benchmark's record as Markdown, the form in which it stands in docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lamella.lab.bench import mole_tables, molex_tables, similarity_tables
from lamella.lab.bench.cells import shown, table, verdict
from lamella.lab.bench.results import BenchResult, Case, load_result

# What the first release is measured against, for the train step of `lamella bench mola`.
MOST_TIME = 1.00  # of PEFT LoRA of equal size
MOST_KEPT = 1.05  # of the activations that LoRA keeps
LEAST_GAIN = 1.5  # of the naive form's time over ours


def render_table(path: Path) -> str:
    """The Markdown of a benchmark's JSON file.

    Raises:
        LamellaError: the file is no record of a benchmark.
    """
    return render_result(load_result(path))


def render_result(result: BenchResult) -> str:
    """The Markdown of a record: on what it ran, its table and, for a whole encoder, its targets."""
    parts = [_conditions(result)]
    parts += [*map(_train_step, result.cases), *map(_targets, result.cases)] if result.bench == "mola" else []
    parts += [_forms(result.cases)] if result.bench == "forms" else []
    if result.bench == "molex":
        parts += [molex_tables.train_step(result), molex_tables.inference(result), molex_tables.targets(result)]
    parts += [mole_tables.layer(result), mole_tables.targets(result)] if result.bench == "mole" else []
    parts += (
        [similarity_tables.flows(result), similarity_tables.targets(result)] if result.bench == "similarity" else []
    )
    return "\n\n".join(parts) + "\n"


def _conditions(result: BenchResult) -> str:
    machine, settings = result.machine, result.settings
    versions = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "transformers", "peft"))
    shape = _shape(result)
    device = machine["processor"] if settings["device"] == "cpu" else machine["accelerators"][0]
    worst = max(max(case.equality.output, case.equality.gradient) for case in result.cases)
    return (
        f"{shape}; {settings['dtype']}, dropout 0; {device}, {settings['threads']} of {machine['cores']} cores, "
        f"{versions}; {result.date}. {settings['rounds']} rounds, {result.clock}. "
        f"Outputs and gradients agree in float64 to {worst:.1e} of the largest entry."
    )


def _shape(result: BenchResult) -> str:
    settings = result.settings
    if result.bench == "similarity":
        return (
            f"{settings['samples']} samples of an expert, {settings['steps']} steps; end to end {settings['layers']} "
            f"layers of {settings['width']} with {settings['experts']} experts, {1024 * settings['batches']:,} tokens"
        )
    shape = f"{settings['layers']} layers of {settings['hidden']}, " if "layers" in settings else ""
    shape += f"one layer of {settings['width']}, " if "width" in settings else ""
    method = {"alpha": "alpha=", "top_k": "top-"}
    shape += f"r={settings['r']}, " + "".join(
        f"{word}{settings[key]}, " for key, word in method.items() if key in settings
    )
    return f"{shape}{settings['tokens']:,} tokens, none of them padding"


def _train_step(case: Case) -> str:
    lora = case.arm("lora")
    rows = []
    for arm in case.arms:
        frozen = "1" if arm.name == "frozen" else shown(case.ratio(arm.name, "frozen"))
        equal = "1" if arm.name == "lora" else ""
        if arm.name.startswith("mola"):
            equal = shown(case.ratio(arm.name, "lora"))
        kept = f"{arm.kept_mb:.1f}", f"{arm.kept_mb / lora.kept_mb:.3f}"
        peak = [] if arm.peak_mb is None else [f"{arm.peak_mb:.1f}"]
        cells = [arm.name, arm.what, f"{arm.trainable_parameters:,}", f"{arm.median_seconds:.3f}", frozen, equal]
        rows.append([*cells, *kept, *peak])
    heads = ["arm", "what it is", "trainable", "s per step", "time / frozen", "time / lora", "kept MB", "kept / lora"]
    return table(heads + (["peak MB"] if lora.peak_mb is not None else []), rows)


def _targets(case: Case) -> str:
    time, gain, alike = (
        case.ratio(*pair) for pair in (("mola", "lora"), ("naive", "mola"), ("naive", "mola balance off"))
    )
    kept = case.arm("mola").kept_mb / case.arm("lora").kept_mb
    rows = [
        ["train step, mola / lora", shown(time), f"<= {MOST_TIME:.2f}", verdict(time.median <= MOST_TIME)],
        ["activations kept, mola / lora", f"{kept:.3f}", f"<= {MOST_KEPT:.2f}", verdict(kept <= MOST_KEPT)],
        ["train step, naive / mola", shown(gain), f">= {LEAST_GAIN:.2f}", verdict(gain.median >= LEAST_GAIN)],
        ["the same, neither with a balance loss", shown(alike), "", ""],
    ]
    return table(["figure", "measured", "target", ""], rows)


def _forms(cases: Sequence[Case]) -> str:
    rows = []
    for case in cases:
        pairs = (("dense", "frozen"), ("sorted", "frozen"), ("lora", "frozen"), ("sorted", "dense"))
        faster = "sorted" if case.ratio("sorted", "dense").median < 1 else "dense"
        rows.append([case.name, *(shown(case.ratio(*pair)) for pair in pairs), faster])
    heads = ["layer", "dense / frozen", "sorted / frozen", "lora of rank E·r / frozen", "sorted / dense", "faster"]
    return table(heads, rows)
