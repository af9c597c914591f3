"""A record as Markdown tables, and the page of documentation that shows the kept records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.catalogue import BENCHMARKS
from benchmarks.record import Arm, Case, Record, Target
from lamella.lab.studies.measuring import Ratio


def render(record: Record) -> str:
    """The Markdown of a record: on what it ran, its arms, and its figures with their targets."""
    benchmark = BENCHMARKS[record.bench]
    by_case = [case for case in record.cases if _begins(case.name, benchmark.by_case)]
    by_arm = [case for case in record.cases if case not in by_case]
    tables = _arms(by_arm), _cases(by_case), _targets(benchmark.targets(record))
    return "\n\n".join([_conditions(record), *filter(None, tables)]) + "\n"


def update_page(page: Path, records: Iterable[Path]) -> None:
    """Put each record's tables between its two marks on the page, ``<!-- FILE -->`` and ``<!-- end -->``."""
    text = page.read_text(encoding="utf-8")
    for path in records:
        before, begin, rest = text.partition(f"<!-- {path.name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = before + begin + render(Record.read(path)) + end + after
    page.write_text(text, encoding="utf-8")


def _begins(name: str, beginning: str | None) -> bool:
    return beginning is not None and name.startswith(beginning)


def _conditions(record: Record) -> str:
    machine, settings = record.machine, record.settings
    versions = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "transformers", "peft"))
    device = machine["processor"] if settings["device"] == "cpu" else machine["accelerators"][0]
    worst = max(max(case.equality.output, case.equality.gradient) for case in record.cases)
    return (
        f"{BENCHMARKS[record.bench].shape(settings)}; {settings['dtype']}, dropout 0; {device}, "
        f"{settings['threads']} of {machine['cores']} cores, {versions}; {record.date}. {settings['rounds']} rounds, "
        f"{record.clock}. Outputs and gradients agree in float64 to {worst:.1e} of the largest entry."
    )


def _arms(cases: Sequence[Case]) -> str:
    """A row per case and arm; a column that says nothing of any of them is left out."""
    if not cases:
        return ""
    compared = Counter(ratio.over for ratio in cases[0].ratios)
    several = len(cases) > 1
    columns: dict[str, Callable[[Case, Arm], str]] = {
        "case": lambda case, arm: case.name if several else "",
        "arm": lambda case, arm: arm.name,
        "what it is": lambda case, arm: arm.what,
        "trainable": lambda case, arm: f"{arm.trainable_parameters:,}" if arm.trainable_parameters else "",
        "blocks run": lambda case, arm: _number(arm.block_runs, 3),
        "GFLOP": lambda case, arm: _number(arm.flops and arm.flops / 1e9, 1),
        "seconds": lambda case, arm: f"{arm.median_seconds:.4g}",
    }
    for over in (over for over, arms in compared.items() if arms > 1):
        columns[f"time / {over}"] = partial(_time, over)
    columns["kept MB"] = lambda case, arm: f"{arm.kept_mb:.2f}" if arm.kept_mb else ""
    columns["peak MB"] = lambda case, arm: _number(arm.peak_mb, 1)
    cells = {head: [cell(case, arm) for case in cases for arm in case.arms] for head, cell in columns.items()}
    used = {head: column for head, column in cells.items() if any(column)}
    return _table(list(used), zip(*used.values(), strict=True))


def _cases(cases: Sequence[Case]) -> str:
    """A row per case with its ratios, and its clock where that is not the record's."""
    if not cases:
        return ""
    heads = [f"{ratio.arm} / {ratio.over}" for ratio in cases[0].ratios]
    rows = [[case.name, *filter(None, [case.clock]), *map(_shown, case.ratios)] for case in cases]
    return _table(["case", *["clock"] * (cases[0].clock is not None), *heads], rows)


def _targets(targets: Sequence[Target]) -> str:
    if not targets:
        return ""
    rows = []
    for target in targets:
        sign, bound = ("<=", target.most) if target.least is None else (">=", target.least)
        judged = (
            ("", "") if bound is None else (f"{sign} {bound:.{target.digits}f}", "met" if target.met else "**missed**")
        )
        rows.append([target.figure, _shown(target.measured), *judged])
    return _table(["figure", "measured", "target", ""], rows)


def _time(over: str, case: Case, arm: Arm) -> str:
    if arm.name == over:
        return "1"
    return next((_shown(ratio) for ratio in case.ratios if (ratio.arm, ratio.over) == (arm.name, over)), "")


def _shown(value: Ratio | float) -> str:
    """A ratio's median, quartiles and ratio of minima."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value.median:.3f} ({value.quartiles[0]:.3f}-{value.quartiles[1]:.3f}; min {value.minima:.3f})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
