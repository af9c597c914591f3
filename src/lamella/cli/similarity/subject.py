"""What the commands on a study share: its model and texts by the names that the command knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamella.cli.progress import showing

if TYPE_CHECKING:
    from pathlib import Path

    from lamella.similarity.study import Study
    from lamella.texts import TextBatches

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def load(name: str, dtype: str) -> tuple[Any, Any]:
    """A model, evaluating, and its tokenizer."""
    from lamella.lab.data import load_backbone

    backbone = load_backbone(name, dtype=dtype)
    return backbone.model.eval(), backbone.tokenizer


def placed(name: str) -> str:
    """A path as it is from any folder; the names that the command knows come before folders of the same name."""
    from pathlib import Path

    from lamella.lab.data import KNOWN_BACKBONES, KNOWN_TASKS

    form, path = ("file:", Path(name[5:])) if name.startswith("file:") else ("", Path(name))
    return f"{form}{path.absolute()}" if name not in {*KNOWN_BACKBONES, *KNOWN_TASKS} and path.exists() else name


def load_model(name: str, dtype: str) -> Any:
    """A model, evaluating."""
    return load(name, dtype)[0]


def open_study(path: Path) -> Study:
    """The study in a folder, its capture finished and of its model.

    Raises:
        LamellaError: no study lies there, its capture is not finished, or its model is gone or another one now.
    """
    from lamella.similarity.study import Study

    with showing("opening the study"):
        return Study.open(path, load)


def read_texts(study: Study, text: str | None, split: str, documents: int | None) -> TextBatches:
    """A text as token batches, cut as the captured one was; that text itself where none is named."""
    from lamella.texts import text_batches

    return text_batches(
        text_source(text or study.subject.text), study.tokenizer, split, study.subject.max_length,
        study.subject.batch_size, documents, encoder_decoder=study.model.config.is_encoder_decoder,
    )  # fmt: skip


def count_tokens(model: str, text: str, split: str, documents: int | None, max_length: int) -> int:
    """The real tokens that a capture of a text reads; of the model only config and tokenizer are read."""
    from transformers import AutoConfig, AutoTokenizer

    from lamella.texts import text_batches

    batches = text_batches(
        text_source(text), AutoTokenizer.from_pretrained(model), split, max_length, limit=documents,
        encoder_decoder=AutoConfig.from_pretrained(model).is_encoder_decoder,
    )  # fmt: skip
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def text_source(text: str) -> Any:
    """What ``text_batches`` reads: a file's path, or a named task."""
    from pathlib import Path

    from lamella.lab.data import load_task
    from lamella.texts.files import SUFFIXES

    return Path(text) if Path(text).is_file() or text.endswith(SUFFIXES) else load_task(text)
