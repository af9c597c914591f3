"""`lamella demo`: does the mixture earn its cost?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import Bar, console, print_json, show_comparison


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the runs and the report.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A few hundred rows; scores then mean nothing.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each method.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if absent.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what is finished.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Compare MoLA with LoRA of equal size on MiniLM and TREC questions, with a floor, in minutes and on any laptop.

    Finished runs are kept: a demo that was interrupted goes on where it stopped.

    Example: lamella demo --seeds 3 -o runs/demo
    """
    from lamella.cli.pages import comparison_report
    from lamella.reporting.report import write_report
    from lamella.training.comparison import compare
    from lamella.training.comparison import demo as arms_of_demo

    arms = arms_of_demo(quick=quick, threads=threads)
    bar = Bar()
    try:
        comparison = compare(arms, range(seeds), output, force=force, callbacks=[bar], starting=console.print)
    finally:
        bar.close()
    page = output / "report.html"
    write_report(comparison_report("lamella demo: MoLA and LoRA of equal size", comparison, arms), page)
    if json:
        print_json({"folder": str(output), "report": str(page), **comparison.as_dict()})
    else:
        show_comparison(comparison)
        console.print(f"Report: {page}")
