"""`lamella similarity align`: aligners for pairs of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing
from lamella.cli.similarity.subject import Json


def align(
    study: Annotated[Path, typer.Argument(help="Folder of a study with a capture.")],
    aligner: Annotated[
        list[str] | None, typer.Option(help="linear, layernorm, low-rank, identity or published; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each aligner; two or more give the seed ceiling.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps of an aligner, at most.")] = 200,
    lr: Annotated[float, typer.Option(help="Step size of Adam.")] = 3e-3,
    per_source: Annotated[
        int | None, typer.Option(min=1, help="Replacements of each expert that the screen lets through; all if absent.")
    ] = None,
    same_layer: Annotated[bool, typer.Option("--same-layer", help="Only pairs within a layer.")] = False,
    score_on: Annotated[Path | None, typer.Option(help="Folder of another study: its text is scored on.")] = None,
    pull: Annotated[str | None, typer.Option(help="Towards the replacement's inputs: mmd or kl.")] = None,
    ray: Annotated[str | None, typer.Option(help="auto, or the address of a Ray cluster; here if absent.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Json = False,
) -> None:
    """Train an aligner for every ordered pair, score it on held-out documents, with controls. Goes on where it stopped.

    The table keeps what other calls aligned: other aligners, seeds and texts to score on. An aligner with other
    settings takes the place of its rows.

    Example: lamella similarity align runs/tiny --aligner linear --seeds 2
    """
    from lamella.cli.similarity.subject import load_model, open_study
    from lamella.similarity.reliability import alignment_facts, alignment_in_words
    from lamella.similarity.steps import align_pairs

    opened = open_study(study)
    with showing("aligning"):
        notes = align_pairs(
            opened, aligner or ["linear"], seeds, load_model, steps=steps, lr=lr, pull=pull, per_source=per_source,
            same_layer=same_layer, score_on=score_on, ray=ray, device=device,
        )  # fmt: skip
    table, path = opened.folder.needed("alignment", "align"), str(study / "alignment.parquet")
    facts = alignment_facts(table)
    if json:
        print_json({"table": path, "rows": len(table), "notes": notes, "aligners": facts})
        return
    sentences = [sentence for name, known in facts.items() for sentence in alignment_in_words(name, known)]
    typer.echo("\n".join([*sentences, *(f"Note: {note}" for note in notes), f"Table: {path}"]))
