"""`lamella export`: a mixture as plain LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing


def export(
    path: Annotated[Path, typer.Argument(help="Folder of a run, or of an adapter.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new folder.")],
    experts: Annotated[bool, typer.Option("--experts", help="Each expert as a LoRA.")] = False,
    collapsed: Annotated[bool, typer.Option("--collapse", help="One LoRA for all, with its measured error.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the one LoRA; all there is if absent.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows that the one LoRA is fitted on.")] = 256,
    task: Annotated[str | None, typer.Option(help="Whose rows those are; the run's task if absent.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, if not the run's or the adapter's.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Write a trained mixture as plain LoRA adapters, which load with PEFT alone.

    Example: lamella export runs/minilm-trec-mola-seed0 --collapse --rank 16 -o adapters/trec-lora
    """
    from lamella.errors import LamellaError
    from lamella.lab.runs.exporting import export_as_experts, export_collapsed

    if experts == collapsed:
        raise LamellaError("Say what to write: either --experts or --collapse.")
    if experts and (rank is not None or task is not None):
        raise LamellaError("--rank and --task belong to --collapse; experts are written as they are.")
    with showing("exporting"):
        made = (
            export_as_experts(path, output, base)
            if experts
            else export_collapsed(path, output, base=base, task=task, rank=rank, rows=rows)
        )
    if json:
        print_json(made.as_dict())
        return
    typer.echo("\n".join(str(adapter) for adapter in made.adapters))
    if made.error is not None:
        where = "rows that were not fitted" if made.error["held_out"] else "the rows that were fitted"
        typer.echo(f"{made.error['error']:.2%} of the mixture's effect is lost, measured on {where} (error.json)")
