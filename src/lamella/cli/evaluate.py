"""`lamella evaluate`: a trained model on a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json


def evaluate(
    path: Annotated[Path, typer.Argument(help="Folder of a run, or of an adapter.")],
    task: Annotated[str | None, typer.Option(help="Any task that fits its head; the run's own if absent.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    base: Annotated[str | None, typer.Option(help="Base model, if not the run's or the adapter's own.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Parquet file, a row per example.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Score a trained model on all rows of a split.

    Example: lamella evaluate runs/minilm-trec-mola-seed0 --task trec --split validation
    """
    from lamella.training.evaluating import evaluate as evaluated

    found = evaluated(path, task, split, base)
    if output is not None:
        found.save_examples(output)
    if json:
        print_json(found.as_dict())
        return
    typer.echo(f"{found.task}, {found.rows:,} {found.split} rows")
    for name, value in found.metrics.items():
        typer.echo(f"{name:<12} {value:.4f}{'  (the metric of the task)' if name == found.metric else ''}")
    for note in found.notes:
        typer.echo(f"note: {note}")
