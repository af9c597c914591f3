"""`lamella library`: what a folder of LoRAs holds, and which of them help a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.cli.output import console, print_json
from lamella.cli.progress import showing

if TYPE_CHECKING:
    from lamella.adapters import AdapterLibrary

library = typer.Typer(help="Folders of many LoRAs: index them, list them, find those that help.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="A folder of LoRAs: PEFT folders, .safetensors files, finished runs.")]
IndexFile = Annotated[
    Path | None, typer.Option("--index", help="The index file, where it shall not lie in the folder.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@library.command()
def index(
    folder: Folder,
    examples: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TASK",
            help="Write the card of a LoRA from the training rows of a named task, hub:NAME or file:ROWS.",
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example, at most.")] = 128,
    index: IndexFile = None,
    json: Json = False,
) -> None:
    """Read what is new or has changed, and write the index beside it. Says which LoRAs are left out, and why.

    What `lamella train` trains has a card, by which "centroids" and "text" retrieve; examples give one to others.

    Example: lamella library index loras --examples law=file:law.jsonl
    """
    opened = open_library(folder, index)
    for given in examples or ():
        name, _, task = given.partition("=")
        _write_card(opened, name, task, max_length)
    if examples:
        opened = open_library(folder, index)
    if json:
        print_json(
            {"folder": str(folder), "loras": len(opened), "left_out": opened.left_out,
             "cards_left_out": opened.cards_left_out}
        )  # fmt: skip
        return
    loras, kinds = len(opened), len(opened.layouts)
    typer.echo(
        f"{loras} LoRA{'s' if loras > 1 else ''}, {kinds} kind{'s' if kinds > 1 else ''} of targets and ranks. "
        f"The index is {opened.path}"
    )
    for name, reason in opened.left_out.items():
        typer.echo(f"left out {name}: {reason}")
    for name, reason in opened.cards_left_out.items():
        typer.echo(f"without its card {name}: {reason}")


@library.command("list")
def list_(folder: Folder, index: IndexFile = None, json: Json = False) -> None:
    """Show each LoRA with its base, task, ranks, targets and size.

    Example: lamella library list loras
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    opened = open_library(folder, index)
    rows = [
        {"name": one.name, "base": one.base, "task": one.task, "labels": list(one.labels),
         "ranks": list(one.ranks), "targets": list(one.targets),
         "dtype": one.dtype, "bytes": one.size, "source": one.reference.source, "sha256": one.reference.sha256}
        for one in opened
    ]  # fmt: skip
    if json:
        print_json({"folder": str(folder), "loras": rows, "left_out": opened.left_out})
        return
    table = Table(box=SIMPLE_HEAD)
    for column in ("name", "base", "task", "ranks", "targets", "size"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for one in opened:
        ranks = ", ".join(map(str, one.ranks))
        table.add_row(one.name, one.base or "", one.task, ranks, ", ".join(one.targets), f"{one.size / 1e6:.2f} MB")
    console.print(table)
    for name, reason in opened.left_out.items():
        console.print(f"left out {name}: {reason}")


@library.command()
def shortlist(
    folder: Folder,
    model: Annotated[str, typer.Option(help="The LoRAs' base: a demo model, a hub id or a path.")],
    task: Annotated[
        str, typer.Option(help="Whose training rows are the examples: a named task, hub:NAME or file:ROWS.")
    ],
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="How many LoRAs are wanted.", show_default="8, or all of fewer")
    ] = None,
    examples: Annotated[int, typer.Option(min=4, help="Rows: half of them choose, half of them judge.")] = 64,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row, at most.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the rows that are drawn, the random LoRA and a new head.")] = 0,
    index: IndexFile = None,
    json: Json = False,
) -> None:
    """Find the LoRAs with the smallest loss on a few labelled rows, beside the base and a random LoRA.

    Example: lamella library shortlist loras --model smollm2 --task text:trec -k 4
    """
    from lamella.lab.shortlisting import shortlist_for

    opened = open_library(folder, index)
    with showing("choosing"):
        found = shortlist_for(opened, model, task, k, examples, max_length, console.print, seed)
    if json:
        print_json(found.as_dict())
        return
    typer.echo(str(found))


def _write_card(opened: AdapterLibrary, name: str, task: str, max_length: int) -> None:
    from lamella.errors import LamellaError
    from lamella.lab.lora_cards import write_card

    if not name or not task:
        raise LamellaError(f"'{name}{task}' names no examples; write --examples NAME=TASK, as in law=file:law.jsonl.")
    write_card(opened, name, task, max_length, lambda words: console.print(f"{name}: {words}"))


def open_library(folder: Path, index: Path | None) -> AdapterLibrary:
    """The library in a folder; shows how far the reading is."""
    from lamella.adapters import AdapterLibrary

    with showing("the library"):
        return AdapterLibrary(folder, index)
