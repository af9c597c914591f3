"""The folder of one study of expert similarity: where each step writes its tables, and of what model and text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella.errors import LamellaError, optional_module
from lamella.files import atomic, claimed, write_atomic
from lamella.similarity.activations import Capture, Manifest
from lamella.similarity.alignment.table import from_first_edition, with_texts

if TYPE_CHECKING:
    import pandas as pd

Load = Callable[[str, str], tuple[Any, Any]]  # name and dtype, to model and tokenizer

_NAME = "study.json"
_CAPTURE = "capture"  # what a table says of the capture that it is from


@dataclass(frozen=True)
class Subject:
    """What a study is of.

    Attributes:
        model: name or hub id of the model, or its absolute path, so that the study goes on from any folder.
        text: a task's name, or a file's absolute path.
        split: of the text that was captured.
        max_length: tokens of a document at most.
        batch_size: documents of a forward.
        documents: of the text at most; None for all.
        dtype: the model's.
    """

    model: str
    text: str
    split: str = "train"
    max_length: int = 256
    batch_size: int = 8
    documents: int | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class StudyFolder:
    """Paths and tables of a study; what is not there yet names the command that makes it."""

    path: Path

    @property
    def capture(self) -> Path:
        """Folder of the capture."""
        return self.path / "capture"

    @property
    def tiles(self) -> Path:
        """Folder of the finished tiles of an alignment."""
        return self.path / "tiles"

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    def subject(self) -> Subject:
        """What the study is of.

        Raises:
            LamellaError: nothing was captured here.
        """
        try:
            return Subject(**json.loads((self.path / _NAME).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise LamellaError(
                f"{self.path} holds no study of expert similarity; begin one with "
                f"`lamella similarity capture MODEL --text TASK -o {self.path}`."
            ) from error

    def begin(self, subject: Subject) -> None:
        """Writes what the study is of; a study of the same goes on, with batches of any size.

        Raises:
            LamellaError: the folder holds a study of something else.
        """
        before = self.subject() if (self.path / _NAME).exists() else subject
        # a study of the first edition may have paths as they were typed
        if str(Path(before.model).absolute()) == subject.model:
            before = replace(before, model=subject.model)
        if str(Path(before.text).absolute()) == subject.text:
            before = replace(before, text=subject.text)
        if replace(before, batch_size=subject.batch_size) != subject:
            changed = [
                name
                for name, value in asdict(subject).items()
                if name != "batch_size" and value != getattr(before, name)
            ]
            differences = ", ".join(
                f"{name} {getattr(before, name)!r} there, {getattr(subject, name)!r} here" for name in changed
            )
            raise LamellaError(f"{self.path} holds a study of something else: {differences}. Name another folder.")
        write_atomic(self.path / _NAME, json.dumps(asdict(subject), indent=1) + "\n")

    @contextmanager
    def alone(self, step: str) -> Iterator[None]:
        """No other process may take this step of the study meanwhile; the kernel gives the lock back, however it ends.

        Raises:
            LamellaError: one is at it.
        """
        with claimed(self.path / "locks" / step) as mine:
            if not mine:
                raise LamellaError(
                    f"Another process is at work on this step of the study in {self.path}. Let it finish, or name "
                    "another folder."
                )
            yield

    def captured(self) -> Capture:
        """The finished capture.

        Raises:
            LamellaError: nothing was captured here, or not to the end of the text.
        """
        subject, capture = self.subject(), Capture.load(self.capture)
        if not capture.manifest.complete:
            raise LamellaError(
                f"The capture in {self.capture} is not finished: it has {capture.manifest.rows_done:,} documents so "
                f"far. Run `lamella similarity capture {subject.model} --text {subject.text} -o {self.path}` again, "
                "with the options it was begun with; it goes on from there."
            )
        return capture

    def is_stale(self, name: str) -> bool:
        """Whether a step's table was made from another capture than the one that is there now.

        A table that does not say from which, because it needs none or was written elsewhere, is not.
        """
        path = self.path / f"{name}.parquet"
        made_from = _said_in(path) if path.exists() else None
        return made_from is not None and made_from != (self._identity() or made_from)

    def table(self, name: str) -> pd.DataFrame | None:
        """A step's table; None where the step was not run.

        Raises:
            LamellaError: it was made from another capture.
        """
        pd = optional_module("pandas", "A table of a study")

        path = self.path / f"{name}.parquet"
        if not path.exists():
            return None
        if self.is_stale(name):
            raise LamellaError(
                f"{path} was made from another capture ({_said_in(path)}) than the one that is there now "
                f"({self._identity()}). Run the step that makes it again, or remove it."
            )
        table = pd.read_parquet(path)
        return with_texts(table) if name == "alignment" else table

    def needed(self, name: str, command: str) -> pd.DataFrame:
        """A step's table.

        Raises:
            LamellaError: the step was not run, or on another capture.
        """
        table = self.table(name)
        if table is None:
            raise LamellaError(
                f"{self.path} has no {name}.parquet yet; run `lamella similarity {command} {self.path}`."
            )
        return table

    def write(self, name: str, table: pd.DataFrame) -> Path:
        """Keeps a step's table atomically, and in it of which capture it is."""
        path = self.path / f"{name}.parquet"
        labelled = table.copy(deep=False)
        if (identity := self._identity()) is not None:
            labelled.attrs = {**table.attrs, _CAPTURE: identity}
        with atomic(path) as unfinished:
            labelled.to_parquet(unfinished, index=False)
        return path

    def aligned(self) -> list[dict[str, Any]]:
        """Of each aligner of the alignment, and each text it was scored on, its settings and notes."""
        noted = (self.facts("alignment") or {}).get("aligners", [])
        if isinstance(noted, list):
            return noted
        # the first edition named both in one key
        ends = [dict(zip(("aligner", "scored_on"), from_first_edition(name), strict=True)) for name in noted]
        return [{**end, **settings} for end, settings in zip(ends, noted.values(), strict=True)]

    def _identity(self) -> str | None:
        """What tells the capture from another; None where there is none, as among kept results."""
        return Manifest.read(self.capture).identity if self.capture.is_dir() else None

    def facts(self, name: str) -> Any:
        """What a step noted as JSON; None where it did not."""
        path = self.path / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def note(self, name: str, facts: Any) -> None:
        """Keeps what a step notes atomically."""
        write_atomic(self.path / f"{name}.json", json.dumps(facts, indent=1) + "\n")


@dataclass(frozen=True)
class Study:
    """A study with its model, for the steps that run it.

    Attributes:
        folder: where each step writes its table.
        subject: of what the study is.
        model: in evaluation mode.
        tokenizer: of the model.
    """

    folder: StudyFolder
    subject: Subject
    model: Any
    tokenizer: Any

    @classmethod
    def open(cls, path: Path, load: Load) -> Study:
        """The study in a folder, its capture finished and of this model.

        Args:
            path: the folder.
            load: from name and dtype to the model and its tokenizer.

        Raises:
            LamellaError: no study lies there, its capture is not finished, or its model is gone or another one now.
        """
        folder = StudyFolder(path)
        capture, subject = folder.captured(), folder.subject()
        model, tokenizer = load(subject.model, subject.dtype)
        capture.check(model, tokenizer)
        return cls(folder, subject, model, tokenizer)

    @cached_property
    def capture(self) -> Capture:
        """The finished capture."""
        return self.folder.captured()


def _said_in(path: Path) -> str | None:
    """Of which capture a table says that it is; its rows are not read."""
    from pyarrow.parquet import read_schema

    attributes = (read_schema(path).pandas_metadata or {}).get("attributes") or {}
    said = attributes.get(_CAPTURE)
    return None if said is None else str(said)
