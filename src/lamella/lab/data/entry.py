"""What a task's YAML file says: where the rows are, what their columns mean and how they are split."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lamella.errors import LamellaError
from lamella.files import read_yaml
from lamella.lab.data.shapes import SHAPES
from lamella.texts.rows import TaskKind

FOLDER = Path(__file__).parent / "tasks"
Split = Literal["train", "validation", "test"]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hub(_Checked):
    """A dataset of the Hugging Face hub.

    Attributes:
        repository: its id.
        config: its configuration, where it has several.
        splits: the hub's split for each of ours; None takes train, validation and test as they are called.
    """

    repository: str
    config: str | None = None
    splits: dict[Split, str] | None = None


class TaskEntry(_Checked):
    """A task as its YAML file describes it.

    Attributes:
        kind: of the rows; None reads it from the columns.
        about: what the rows are, for the model card.
        labels: name of each label, in the order of their numbers; a label may be its name or its number.
        metric: the benchmark's metric, where it is not the kind's usual one.
        asset: the demo asset that `files` are in, a key of assets.yaml.
        folder: the folder of `LAMELLA_DATA` that `files` are in; `hub` is taken where it is not there.
        files: file or files of each split, or of "all" rows, which `split` divides. Without `asset` and `folder` they
            lie beside the YAML file. A name may be a pattern, such as `words_*.json`.
        hub: the dataset on the hub.
        format: of the files, where their suffix does not say (see `lamella.lab.data.sources`).
        shape: the function that makes rows of what the files hold, by its name in `lamella.lab.data.shapes`.
        columns: our name for each of the rows' columns that has another.
        keep: values of a column; rows with others are left out.
        group: column of which equal rows stay in one split; by default those that ask the same.
        unit: the word for a group.
        split: rows held out of "all" for test and validation; or rows for train and validation, the rest being the
            test.
        subset: column that `NAME/SUBSET` selects by.
        drop_empty: whether rows without text are dropped; otherwise they are an error.
        licence: the terms of the rows, where their source states none.
        caution: what a user must know before reporting a score.
    """

    kind: TaskKind | None = None
    about: str = ""
    labels: tuple[str, ...] = ()
    metric: str | None = None
    asset: str | None = None
    folder: str | None = None
    files: dict[Split | Literal["all"], str | list[str]] = Field(default_factory=dict)
    hub: Hub | None = None
    format: Literal["csv", "json", "lines"] | None = None
    shape: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    keep: dict[str, list[str | int]] = Field(default_factory=dict)
    group: str | None = None
    unit: str = "text"
    split: dict[Split, int] = Field(default_factory=dict)
    subset: str | None = None
    drop_empty: bool = False
    licence: str = ""
    caution: str = ""

    @model_validator(mode="after")
    def _complete(self) -> TaskEntry:
        if not self.files and self.hub is None:
            raise ValueError("give files or hub, where the rows are")
        if "all" in self.files and len(self.files) > 1:
            raise ValueError("files has 'all' beside other splits; give one or the other")
        if self.files and "all" not in self.files and not {"train"} < set(self.files):
            raise ValueError("files needs train and one of validation and test, or all")
        if self.split and "all" not in self.files:
            raise ValueError("split divides the files called 'all', and there are none")
        if self.split and ("train" in self.split) == ("test" in self.split):
            raise ValueError("split needs a number of rows for either train or test; the other one gets the rest")
        if self.shape is not None and self.shape not in SHAPES:
            raise ValueError(f"shape {self.shape!r} is unknown; known are {', '.join(SHAPES)}")
        explained = [key for key in ("labels", "shape", "columns", "keep", "drop_empty") if getattr(self, key)]
        if self.kind is None and explained:
            raise ValueError(f"{explained[0]} is read of a task whose kind is named, and kind is missing")
        return self


def read_entry(path: Path) -> TaskEntry:
    """A task's YAML file.

    Raises:
        LamellaError: it is missing, is not YAML, or has a key or value that a task cannot have.
    """
    try:
        return TaskEntry.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise LamellaError(
            f"The task file {path.name}, {where}: {first['msg'].removeprefix('Value error, ')}. The keys of a task are "
            f"{', '.join(TaskEntry.model_fields)}."
        ) from error
