"""The model and the texts of a study, as its folder names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from lamella.similarity.activations import Capture, TextBatches
    from lamella.similarity.study import StudyFolder, Subject

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@dataclass(frozen=True)
class Loaded:
    """A study's folder with the model loaded; there need not be a capture yet.

    Attributes:
        folder: where each step keeps what it found.
        subject: of what the study is.
        model: in evaluation mode.
        tokenizer: of the model.
    """

    folder: StudyFolder
    subject: Subject
    model: Any
    tokenizer: Any

    def texts(self, text: str | None, split: str, documents: int | None) -> TextBatches:
        """A text as token batches, cut as the captured one was; that text itself where none is named."""
        from lamella.similarity.activations import text_batches

        return text_batches(
            _source(text or self.subject.text), self.tokenizer, split, self.subject.max_length,
            self.subject.batch_size, documents, encoder_decoder=self.model.config.is_encoder_decoder,
        )  # fmt: skip


@dataclass(frozen=True)
class Opened(Loaded):
    """The same with what was captured.

    Attributes:
        capture: finished, and of this model and tokenizer.
    """

    capture: Capture


def open_study(path: Path) -> Opened:
    """The study in a folder, its capture and its model.

    Raises:
        LamellaError: no study lies there, its capture is not finished, or its model is gone or another one now.
    """
    from lamella.similarity.study import StudyFolder

    folder = StudyFolder(path)
    capture = folder.captured()
    loaded = open_subject(folder, folder.subject())
    capture.check(loaded.model, loaded.tokenizer)
    return Opened(folder, loaded.subject, loaded.model, loaded.tokenizer, capture)


def open_subject(folder: StudyFolder, subject: Subject) -> Loaded:
    """A folder with the model of a subject loaded."""
    from lamella.lab.data import load_backbone

    backbone = load_backbone(subject.model, dtype=subject.dtype)
    return Loaded(folder, subject, backbone.model.eval(), backbone.tokenizer)


def _source(text: str) -> Any:
    from pathlib import Path

    from lamella.lab.data import load_task
    from lamella.texts.files import SUFFIXES

    return Path(text) if Path(text).is_file() or text.endswith(SUFFIXES) else load_task(text)
