"""`lamella similarity capture`: one pass over text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing
from lamella.cli.similarity.subject import Json


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
    seed: Annotated[int, typer.Option(help="Of the samples and the order of documents.")] = 0,
    whole_text: Annotated[
        bool, typer.Option("--whole-text", help="Read on when every expert has its samples, to count all choices.")
    ] = False,
    json: Json = False,
) -> None:
    """Run text through a model once and keep a uniform sample of what each expert is given. Goes on where it stopped.

    Documents come in random order, and it ends when every expert has its samples.

    Example: lamella similarity capture tiny-moe --text news -o runs/tiny
    """
    from lamella.backbones.moe import moe_layers
    from lamella.cli.similarity.subject import load, placed, read_texts
    from lamella.similarity.steps import capture_texts, sample_dtype
    from lamella.similarity.study import Study, StudyFolder, Subject

    kept_in = sample_dtype(samples)
    subject = Subject(placed(model), placed(text), split, max_length, batch_size, documents, dtype)
    with showing("capturing"):
        study = Study(StudyFolder(output), subject, *load(subject.model, dtype))
        moe_layers(study.model)  # what has no experts begins no study
        texts = read_texts(study, subject.text, split, documents)
        taken = capture_texts(study, texts, per_expert, seed, kept_in, whole_text)
    if json:
        print_json({"folder": str(output), **taken.facts(), "notes": list(texts.notes)})
        return
    text_words, expert_words = taken.in_words()
    notes = [f"Note: {note}" for note in texts.notes]
    typer.echo("\n".join([text_words, *notes, expert_words, f"Capture: {output / 'capture'}"]))
