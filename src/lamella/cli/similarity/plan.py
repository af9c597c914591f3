"""`lamella similarity plan`: what a study would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing
from lamella.cli.similarity.subject import Json


def plan(
    model: Annotated[str, typer.Argument(help="A model's name, path or config.json; weights are not read.")],
    text: Annotated[str | None, typer.Option(help="That will be captured: its tokens are counted.")] = None,
    split: Annotated[str, typer.Option(help="Of the text.")] = "train",
    documents: Annotated[int | None, typer.Option(min=1, help="Of the text, at most; all if absent.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a document, at most.")] = 256,
    per_expert: Annotated[int, typer.Option(min=2, help="Samples of each expert.")] = 512,
    aligner: Annotated[str, typer.Option(help="linear, layernorm, low-rank, identity or published.")] = "linear",
    steps: Annotated[int, typer.Option(min=1, help="Steps of an aligner, at most.")] = 200,
    per_source: Annotated[
        int | None, typer.Option(min=1, help="Replacements of each expert that the screen lets through; all if absent.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the samples: float32 or bfloat16.")] = "float32",
    skew: Annotated[float, typer.Option(min=1, help="How much more often than the rarest the mean is chosen.")] = 4.0,
    flops: Annotated[float | None, typer.Option(help="FLOP/s of your machines; measured here if absent.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file of the plan.")] = None,
    json: Json = False,
) -> None:
    """Print roughly how much text, time, disk and memory a study takes, before starting it.

    Example: lamella similarity plan Qwen/Qwen1.5-MoE-A2.7B --text news --dtype bfloat16 --per-source 16
    """
    from dataclasses import asdict

    from lamella.cli.similarity.subject import count_tokens
    from lamella.lab.data.models import located
    from lamella.similarity import plan as planned

    path = located(model)
    with showing("planning"):
        plan = planned(
            path, per_expert, tokens=None if text is None else count_tokens(path, text, split, documents, max_length),
            aligner=aligner, steps=steps, per_source=per_source, dtype=dtype,
            skew=skew, flops_per_second=flops,
        )  # fmt: skip
    if output is not None:
        plan.write(output)
    if json:
        print_json(asdict(plan))
    else:
        typer.echo(str(plan))
