"""`lamella evaluate`: a trained model on a task, or several under noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli.output import console, print_json, show_noise, show_scores
from lamella.cli.progress import showing


def evaluate(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folder of a run or an adapter; of several under --noise.")
    ],
    task: Annotated[str | None, typer.Option(help="Any task that fits its head; the run's if absent.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    base: Annotated[str | None, typer.Option(help="Base model, if not the run's or the adapter's.")] = None,
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
        drawn = {} if seeds is None else {"seeds": seeds}
        _under_noise(paths, noise, sigma, output, json, task=task, split=split, base=base, **drawn)
        return
    if len(paths) > 1 or sigma is not None or seeds is not None:
        raise LamellaError(
            "Several runs, --sigma and --seeds belong to an evaluation under noise. Name the noise with --noise "
            "embedding, tokens or pgd, or evaluate one run without them."
        )
    with showing("evaluating"):
        scored = evaluated(paths[0], task, split, base)
    if output is not None:
        scored.save_examples(output)
    if json:
        print_json(scored.as_dict())
    else:
        show_scores(scored)


def _under_noise(
    paths: list[Path],
    noise: str,
    sigma: str | None,
    output: Path | None,
    json: bool,
    **what: Any,
) -> None:
    from lamella.lab.pages import robustness_report
    from lamella.lab.report.report import write_report
    from lamella.lab.robustness.comparison import check_folder, robustness, strengths_of

    if output is not None:
        check_folder(output)
    strengths = None if sigma is None else strengths_of(sigma)
    with showing("evaluating"):
        measured = robustness(paths, noise, strengths, **what)
        if output is not None:
            page = write_report(robustness_report(measured), output / "report.html")
            measured.save(output)
    if output is not None:
        console.print(f"Report: {page}")
    if json:
        print_json(measured.as_dict())
    else:
        show_noise(measured)
