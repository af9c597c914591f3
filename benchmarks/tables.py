"""A record as Markdown tables, and the page of documentation that shows the kept records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.catalogue import BENCHMARKS
from benchmarks.record import Case, Method, Record, Target
from lamella.lab.studies.measuring import Ratio


def render(record: Record) -> str:
    """The Markdown of a record: on what it ran, its methods, and its figures with their targets."""
    benchmark = BENCHMARKS[record.bench]
    by_case = [case for case in record.cases if _begins(case.name, benchmark.by_case)]
    by_method = [case for case in record.cases if case not in by_case]
    tables = _methods(by_method), _cases(by_case), _targets(benchmark.targets(record))
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


def _methods(cases: Sequence[Case]) -> str:
    """A row per case and method; a column that says nothing of any of them is left out."""
    if not cases:
        return ""
    compared = Counter(ratio.over for ratio in cases[0].ratios)
    several = len(cases) > 1
    columns: dict[str, Callable[[Case, Method], str]] = {
        "case": lambda case, method: case.name if several else "",
        "method": lambda case, method: method.name,
        "what it is": lambda case, method: method.what,
        "trainable": lambda case, method: f"{method.trainable_parameters:,}" if method.trainable_parameters else "",
        "blocks run": lambda case, method: _number(method.block_runs, 3),
        "GFLOP": lambda case, method: _number(method.flops and method.flops / 1e9, 1),
        "seconds": lambda case, method: f"{method.median_seconds:.4g}",
    }
    for over in (over for over, methods in compared.items() if methods > 1):
        columns[f"time / {over}"] = partial(_time, over)
    columns["perplexity"] = lambda case, method: _number(method.perplexity, 2)
    columns["kept MB"] = lambda case, method: f"{method.kept_mb:.2f}" if method.kept_mb else ""
    columns["peak MB"] = lambda case, method: _number(method.peak_mb, 1)
    cells = {head: [cell(case, method) for case in cases for method in case.methods] for head, cell in columns.items()}
    used = {head: column for head, column in cells.items() if any(column)}
    return _table(list(used), zip(*used.values(), strict=True))


def _cases(cases: Sequence[Case]) -> str:
    """A row per case with its ratios, and its clock where that is not the record's."""
    if not cases:
        return ""
    heads = [f"{ratio.method} / {ratio.over}" for ratio in cases[0].ratios]
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


def _time(over: str, case: Case, method: Method) -> str:
    if method.name == over:
        return "1"
    return next((_shown(ratio) for ratio in case.ratios if (ratio.method, ratio.over) == (method.name, over)), "")


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
