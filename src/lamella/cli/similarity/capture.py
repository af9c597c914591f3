"""`lamella similarity capture`: one pass over text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.cli.output import console, print_json
from lamella.cli.similarity.subject import Json

if TYPE_CHECKING:
    from lamella.similarity.activations import Capture


def capture(
    model: Annotated[str, typer.Argument(help="tiny-moe, a hub id or a path of a mixture-of-experts model.")],
    text: Annotated[str, typer.Option(help="A named task, hub:NAME, or a file of text or rows.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the study.")],
    split: Annotated[str, typer.Option(help="Of the text; a file has train, test and all.")] = "train",
    documents: Annotated[int | None, typer.Option(min=1, help="At most so many; all if absent.")] = None,
    per_expert: Annotated[int, typer.Option(min=2, help="Samples of each expert.")] = 512,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a document, at most.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents of a forward.")] = 8,
    samples: Annotated[str, typer.Option(help="Precision of the samples: float32 or bfloat16.")] = "float32",
    dtype: Annotated[str, typer.Option(help="Precision of the model: float32, bfloat16 or auto.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    json: Json = False,
) -> None:
    """Run text through a model once and keep a uniform sample of what each expert is given. Goes on where it stopped.

    Example: lamella similarity capture tiny-moe --text news -o studies/tiny
    """
    import json as json_module

    import torch

    from lamella.backbones.moe import moe_layers
    from lamella.cli.similarity.subject import open_subject
    from lamella.errors import LamellaError
    from lamella.similarity import capture as captured
    from lamella.similarity import distributions
    from lamella.similarity.study import StudyFolder, Subject

    kept_as = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if samples not in kept_as:
        raise LamellaError(f"samples={samples!r}: samples are kept as {' or '.join(kept_as)}.")
    folder = StudyFolder(output)
    opened = open_subject(folder, Subject(model, text, split, max_length, batch_size, documents, dtype))
    moe_layers(opened.model)  # what has no experts begins no study
    texts = opened.texts(text, split, documents)
    folder.begin(opened.subject)
    truth = Path(model) / "ground_truth.json"
    if truth.is_file():  # a model that was made so that it is known which experts are alike
        folder.note("ground_truth", json_module.loads(truth.read_text(encoding="utf-8")))
    with console.status("capturing") as status:
        found = captured(
            opened.model, texts, folder.capture, per_expert, seed=seed, dtype=kept_as[samples],
            tokenizer=opened.tokenizer, origin=texts.origin,
            progress=lambda now: status.update(
                f"{now.rows:,} documents, {now.tokens:,} tokens, {now.tokens_per_second:,.0f} tokens/s; "
                f"{now.short} of {now.experts} experts still short of {per_expert} samples"
            ),
        )  # fmt: skip
    found.write_tables()
    norms, plane = distributions(found, opened.model)
    folder.write("histogram", norms)
    folder.write("plane", plane)
    _show(found, texts.notes, output, json)


def _show(found: Capture, notes: tuple[str, ...], output: Path, json: bool) -> None:
    routing = found.routing
    manifest = found.manifest
    short, silent = found.short(manifest.per_expert), found.short(1)
    facts = {
        "folder": str(output),
        "documents": manifest.rows_done,
        "tokens": manifest.tokens,
        "experts": len(routing),
        "short": [list(name) for name in short],
        "silent": [list(name) for name in silent],
        "smallest_share": float(routing["share"].min()),
        "dropped": int(routing["dropped"].sum()),
        "notes": list(notes),
    }
    if json:
        print_json(facts)
        return
    typer.echo(f"{manifest.tokens:,} tokens of {manifest.rows_done:,} documents. {manifest.origin}")
    for note in notes:
        typer.echo(f"Note: {note}")
    typer.echo(
        f"{len(routing)} experts in {routing['layer'].nunique()} layers; {len(short)} with fewer than "
        f"{manifest.per_expert} samples, {len(silent)} never chosen{_named(silent)}. The smallest share of a layer's "
        f"choices is {facts['smallest_share']:.1%}; {facts['dropped']:,} choices had no room."
    )
    typer.echo(f"Capture: {output / 'capture'}")


def _named(experts: list[tuple[int, int]]) -> str:
    if not experts:
        return ""
    return ": " + ", ".join(f"layer {layer} expert {expert}" for layer, expert in experts)
