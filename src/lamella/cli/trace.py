"""`lamella trace`: where a trained model sends its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing


def trace(
    path: Annotated[Path, typer.Argument(help="Folder of a run, or of an adapter.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of trace.parquet, coactivation.parquet and report.html.")
    ],
    task: Annotated[str | None, typer.Option(help="Any task that fits its head; the run's if absent.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    rows: Annotated[int, typer.Option(min=1, help="Rows that are traced, always the same ones.")] = 256,
    base: Annotated[str | None, typer.Option(help="Base model, if not the run's or the adapter's.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Record the routing of a trained mixture on a task, and show it, of a few rows token by token.

    Example: lamella trace runs/minilm-trec-mola-seed0 --task trec --rows 100 -o traces/trec
    """
    from lamella.diagnostics.doctor import doctor
    from lamella.lab.pages import trace_report
    from lamella.lab.report.report import write_report
    from lamella.lab.runs.evaluating import trace as traced
    from lamella.progress import working

    frame, page = output / "trace.parquet", output / "report.html"
    with showing("tracing"):
        result = traced(path, task, split=split, rows=rows, base=base)
        with working("examining"):
            report = trace_report(result, doctor(path, base or result.trained.place.base))
        result.save(output)
        write_report(report, page)
    if json:
        print_json({"trace": str(frame), "report": str(page), **result.evaluation.as_dict(), **result.summary})
    else:
        notes = [f"note: {note}" for note in result.evaluation.notes]
        typer.echo("\n".join([report.summary, *notes, f"Trace: {frame}", f"Report: {page}"]))
