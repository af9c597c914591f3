"""The folder of one study of expert similarity: where each step keeps what it found, and of what model and text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella.errors import LamellaError
from lamella.writing import whole, write_whole

if TYPE_CHECKING:
    import pandas as pd

TABLES = (
    "screen", "alignment", "swap", "shifts", "compression", "rerouting", "histogram", "plane",
)  # fmt: skip
_NAME = "study.json"


@dataclass(frozen=True)
class Subject:
    """What a study is of.

    Attributes:
        model: name, hub id or path of the model.
        text: a task's name, or ``file:`` with a path.
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
        """Writes what the study is of; a study of the same goes on.

        Raises:
            LamellaError: the folder holds a study of something else.
        """
        if (self.path / _NAME).exists() and (before := self.subject()) != subject:
            changed = [name for name, value in asdict(subject).items() if value != getattr(before, name)]
            differences = ", ".join(
                f"{name} {getattr(before, name)!r} there, {getattr(subject, name)!r} here" for name in changed
            )
            raise LamellaError(f"{self.path} holds a study of something else: {differences}. Name another folder.")
        write_whole(self.path / _NAME, json.dumps(asdict(subject), indent=1) + "\n")

    def table(self, name: str) -> pd.DataFrame | None:
        """A step's table; None where the step was not run."""
        import pandas as pd

        path = self.path / f"{name}.parquet"
        return pd.read_parquet(path) if path.exists() else None

    def needed(self, name: str, command: str) -> pd.DataFrame:
        """A step's table.

        Raises:
            LamellaError: the step was not run.
        """
        found = self.table(name)
        if found is None:
            raise LamellaError(
                f"{self.path} has no {name}.parquet yet; run `lamella similarity {command} {self.path}`."
            )
        return found

    def write(self, name: str, table: pd.DataFrame) -> Path:
        """Keeps a step's table, whole or not at all."""
        path = self.path / f"{name}.parquet"
        with whole(path) as unfinished:
            table.to_parquet(unfinished, index=False)
        return path

    def facts(self, name: str) -> Any:
        """What a step noted as JSON; None where it did not."""
        path = self.path / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def note(self, name: str, facts: Any) -> None:
        """Keeps what a step notes, whole or not at all."""
        write_whole(self.path / f"{name}.json", json.dumps(facts, indent=1) + "\n")
