"""Which rows a run learned from and was scored on: a digest of each lies in its folder, to compare others with."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError, UnreadableError
from lamella.files import atomic
from lamella.lab.data.splitting import telling_columns
from lamella.lab.data.task import Task
from lamella.lab.runs.folder import ROWS, RunFolder
from lamella.lab.runs.settings import RunSettings, settings_of
from lamella.lab.runs.tasks import limited, rows_used

_NONE = np.empty(0, np.uint64)
Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Rows:
    """The rows of a task, 8 bytes each.

    Attributes:
        whole: by split, a digest of everything in a row, in the split's order.
        told: by split, a digest of what gives a row away to a model that was trained on it: its texts, without case,
            spacing, forms of a letter and label.
    """

    whole: Mapping[str, Digests]
    told: Mapping[str, Digests]

    @classmethod
    def of(cls, task: Task) -> Rows:
        """The rows of every split; of several tasks one task's after the other's."""
        whole: dict[str, list[Digests]] = {split: [] for split in task.splits}
        told: dict[str, list[Digests]] = {split: [] for split in task.splits}
        for part in task.tasks:
            for split, rows in part.splits.items():
                listed = list(rows)
                columns = telling_columns(part.kind, listed[0])
                whole[split].append(_digests(json.dumps(row, sort_keys=True) for row in listed))
                told[split].append(_digests("\x1d".join(_told(row[column]) for column in columns) for row in listed))
        return cls(*({split: np.concatenate(some) for split, some in one.items()} for one in (whole, told)))

    @classmethod
    def read(cls, run: Path) -> Rows | None:
        """What a run saved; None where an earlier edition saved nothing.

        Raises:
            UnreadableError: the file is damaged, or is not as the run left it.
        """
        table = RunFolder(run).table(ROWS, "split", "whole", "told")
        if table is None:
            return None
        if not table["whole"].dtype == table["told"].dtype == np.uint64:
            raise UnreadableError(f"{run / ROWS} holds no digests. Restore it from a copy, or run it again.")
        parts = {str(split): part for split, part in table.groupby("split", sort=False)}
        return cls(*({split: part[name].to_numpy() for split, part in parts.items()} for name in ("whole", "told")))

    def save(self, run: Path) -> None:
        """Write ``rows.parquet``: split, whole, told."""
        import pandas as pd

        frames = [
            pd.DataFrame({"split": split, "whole": self.whole[split], "told": self.told[split]}) for split in self.whole
        ]
        with atomic(run / ROWS) as path:
            pd.concat(frames, ignore_index=True).to_parquet(path, index=False)

    def names(self) -> dict[str, str]:
        """One digest for each split, by which two runs can be seen to have had the same rows in the same order."""
        return {split: hashlib.sha256(digests.tobytes()).hexdigest()[:16] for split, digests in self.whole.items()}

    def changes(self, split: str, now: Rows) -> str:
        """How a split that is read now differs from these rows, in words; empty where it does not."""
        before, after = (rows.whole.get(split, _NONE) for rows in (self, now))
        if np.array_equal(before, after):
            return ""
        said = []
        if len(fresh := np.flatnonzero(~np.isin(after, before))):
            said.append(f"{len(fresh):,} of {len(after):,} are new, the first is row {fresh[0] + 1}")
        if gone := int((~np.isin(before, after)).sum()):
            said.append(f"{gone:,} of {len(before):,} are gone")
        if not said:
            said = ["some stand there more or less often" if len(before) != len(after) else "their order is another"]
        return "; ".join(said)


@dataclass(frozen=True)
class Seen:
    """What a run's digests say of the rows of one split.

    Attributes:
        trained: (rows,) which of them were trained on; None where that cannot be checked.
        notes: the same in words, and how the split has changed since the run.
    """

    trained: npt.NDArray[np.bool_] | None
    notes: tuple[str, ...]


def seen(run: Path | None, settings: RunSettings | None, task: Task, split: str, count: int | None) -> Seen:
    """Which of a split's rows the run in a folder was trained on, and whether the split is still that of the run.

    Args:
        run: its folder; None for an adapter without a run.
        settings: of the run.
        task: any task.
        split: of the task.
        count: rows that are used of it, as `Trained.rows` takes them; all where None.

    Raises:
        UnreadableError: the run's digests are damaged.
    """
    before = None if run is None else Rows.read(run)
    if run is None or before is None or settings is None:
        whose = "This adapter lies without its run" if run is None else f"{run} keeps no digests of its rows"
        return Seen(None, (f"{whose}: whether it was trained on the {split} rows of {task.name} cannot be checked.",))
    now = Rows.of(rows_used(task, split, count))
    parts = _of_parts(settings)
    trained = np.isin(now.told[split], before.told.get("train", _NONE))
    if split != "train":  # what the run itself held out was none of its training rows
        trained &= ~np.isin(now.whole[split], before.whole.get(split, _NONE))
    for rows in parts.values():
        trained |= np.isin(now.told[split], _NONE if rows is None else rows.told.get("train", _NONE))
    chosen = np.isin(now.whole[split], before.whole.get("validation", _NONE))
    notes = [
        f"The LoRA '{name}' lies without digests of its rows: whether it was trained on these cannot be checked."
        for name, rows in parts.items()
        if rows is None
    ]
    if trained.any():
        notes.append(
            f"{_part(trained)} {split} rows of {task.name} were trained on, the first is row {trained.argmax() + 1}: "
            "scores on them are not those of unseen rows."
        )
    if split != "validation" and chosen.any():
        notes.append(
            f"{_part(chosen)} {split} rows of {task.name} were validation rows of the run, by which its checkpoint may "
            "have been chosen."
        )
    if task.name == settings.task and split in before.whole:
        changes = before.changes(split, Rows.of(limited(task, settings.limit)))
        notes += [f"The {split} rows of {task.name} are not those of the run: {changes}."] * bool(changes)
    return Seen(trained, tuple(notes))


def check_unchanged(run: Path, task: Task, now: Rows) -> None:
    """Raises LamellaError if an interrupted run began with other rows than are read now."""
    if (before := Rows.read(run)) is None:
        return
    for split in sorted(before.whole.keys() | now.whole.keys()):
        if changes := before.changes(split, now):
            raise LamellaError(
                f"The {split} rows of {task.name} are not those that the run in {run} began with: {changes}. Restore "
                "them to go on with it, or give --force to start afresh."
            )


def _of_parts(settings: RunSettings) -> dict[str, Rows | None]:
    """The rows of the LoRAs that the run composed, by their names, and of the runs that it went on from."""
    places = {name: Path(place) for name, place in getattr(settings.method, "adapters", {}).items()}
    start = settings.start
    while start is not None:
        place = places[f"start {Path(start).name}"] = Path(start)
        start = settings_of(place).start if (place / "run.yaml").is_file() else None
    runs = {name: place if (place / "run.yaml").is_file() else place.parent for name, place in places.items()}
    return {name: Rows.read(run) if (run / "run.yaml").is_file() else None for name, run in runs.items()}


def _part(rows: npt.NDArray[np.bool_]) -> str:
    return f"All {len(rows):,}" if rows.all() else f"{int(rows.sum()):,} of the {len(rows):,}"


def _digests(texts: Iterable[str]) -> Digests:
    parts = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(parts, np.uint64)


def _told(value: Any) -> str:
    """A value as text, alike for what a reader would call the same; options in another order are the same question."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).casefold().split())
    if isinstance(value, Mapping):
        return "\x1e".join(_told(one) for one in value.values())
    if isinstance(value, list):
        parts = list(map(_told, value))
        return "\x1f".join(sorted(parts) if all(isinstance(one, str) for one in value) else parts)
    return str(value)
