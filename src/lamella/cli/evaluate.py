"""`lamella evaluate`: a trained model on a task, or several under noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.cli.output import console, print_json

if TYPE_CHECKING:
    from lamella.lab.robustness.robustness import Robustness


def evaluate(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folder of a run or an adapter; of several under --noise.")
    ],
    task: Annotated[str | None, typer.Option(help="Any task that fits its head; the run's own if absent.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    base: Annotated[str | None, typer.Option(help="Base model, if not the run's or the adapter's own.")] = None,
    noise: Annotated[
        str | None,
        typer.Option(help="embedding (Gaussian), tokens (replaced) or pgd (attack on embeddings), at test time."),
    ] = None,
    sigma: Annotated[
        str | None,
        typer.Option(
            help="Strengths of the noise, such as 0.1,0.5: relative to the embeddings, or for tokens a probability."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Draws of the noise; 5 if absent.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Parquet file, a row per example; with --noise a folder with a report."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Score a trained model on all rows of a split, or several models under noise.

    Example: lamella evaluate runs/minilm-trec-mola-seed0 --task trec --split validation

    Example: lamella evaluate runs/mola runs/lora --noise embedding --sigma 0.1,0.5 -o runs/noise
    """
    from lamella.errors import LamellaError
    from lamella.lab.runs.evaluating import evaluate as evaluated

    if noise is not None:
        _under_noise(paths, noise, sigma, seeds, task, split, base, output, json)
        return
    if len(paths) > 1 or sigma is not None or seeds is not None:
        raise LamellaError(
            "Several runs, --sigma and --seeds belong to an evaluation under noise. Name the noise with --noise "
            "embedding, tokens or pgd, or evaluate one run without them."
        )
    found = evaluated(paths[0], task, split, base)
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


def _under_noise(
    paths: list[Path],
    noise: str,
    sigma: str | None,
    seeds: int | None,
    task: str | None,
    split: str,
    base: str | None,
    output: Path | None,
    json: bool,
) -> None:
    from lamella.lab.pages import robustness_report
    from lamella.lab.report.report import write_report
    from lamella.lab.robustness.robustness import check_folder, robustness, strengths_of

    if output is not None:
        check_folder(output)
    given = {} if seeds is None else {"seeds": seeds}
    strengths = None if sigma is None else strengths_of(sigma)
    with console.status("reading") as status:
        found = robustness(paths, noise, strengths, **given, task=task, split=split, base=base, starting=status.update)
    if output is not None:
        write_report(robustness_report(found), output / "report.html")
        found.save(output)
    if json:
        print_json(found.as_dict())
        return
    _show(found)
    if output is not None:
        typer.echo(f"Report: {output / 'report.html'}")


def _show(found: Robustness) -> None:
    """A row per strength and method with its mean and how it differs from the first, and the answer in words."""
    from rich.table import Table

    table = Table(title=f"{found.task} under {found.noise.title}, mean of {found.seeds} seed(s)", title_justify="left")
    for column in (found.noise.symbol, "method", found.metric, "difference", "95 % interval"):
        table.add_column(column, justify="left" if column == "method" else "right")
    differences = {(one.method, one.strength): one for one in found.differences.itertuples()}
    for strength, means in found.means.items():
        for method, value in means.items():
            one = differences.get((method, strength))
            words = ("", "") if one is None else (f"{one.difference:+.3f}", f"{one.low:+.3f} to {one.high:+.3f}")
            table.add_row(f"{strength:g}", method, f"{value:.3f}", *words)
        table.add_section()
    console.print(table)
    typer.echo(found.summary)
    for note in found.notes:
        typer.echo(f"note: {note}")
