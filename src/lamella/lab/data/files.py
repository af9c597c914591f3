"""Rows from local files: JSON lines, CSV and Parquet, one file or one file a split."""

from __future__ import annotations

from pathlib import Path

from lamella.errors import LamellaError
from lamella.files import sha256_of
from lamella.lab.data.splitting import build_task, complete_published, split_whole
from lamella.lab.data.task import Task
from lamella.texts.files import SUFFIXES, read_rows
from lamella.texts.rows import Table, read_columns

_SPLIT_FILES = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}


def load_file(name: str, where: str, *, seed: int = 0) -> Task:
    """A task from one file (split here), or from a folder with `train`, `validation` and `test` files.

    Source and licence are read from the lines `- repository:` and `- license:` of a `SOURCE.md` beside them.

    Args:
        name: the task's name as the user wrote it.
        where: path of the file or folder.
        seed: order of the training rows.

    Raises:
        LamellaError: the file is missing or unreadable, or a row cannot be used; it names file, row and column.
    """
    path = Path(where).expanduser()
    files = split_files(path) if path.is_dir() else {"all": path}
    kind, splits, label_names, notes = read_columns(
        {split: Table(file.name, read_rows(file)) for split, file in files.items()}
    )
    if "all" in splits:
        rows = splits["all"]
        done, said = split_whole(kind, rows, test=max(1, len(rows) // 5), validation=max(1, len(rows) // 10))
        if not all(done.values()):
            raise LamellaError(f"{path.name} has too few different rows to fill train, validation and test. Add rows.")
    else:
        done, said = complete_published(kind, splits)
    digests = ", ".join(f"{file.name} sha256 {sha256_of(file)[:16]}" for file in files.values())
    stated = stated_source(path if path.is_dir() else path.parent)
    return build_task(
        name,
        kind,
        done,
        label_names=label_names,
        source=f"{stated.get('repository', 'local files')} ({digests})",
        licence=stated.get("license", "not stated (local files)"),
        notes=[*notes, *said],
        seed=seed,
    )


def split_files(folder: Path) -> dict[str, Path]:
    """The file of each split in a folder.

    Raises:
        LamellaError: no train file, or two files for one split.
    """
    found: dict[str, Path] = {}
    for split, stems in _SPLIT_FILES.items():
        files = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        there = [file for file in files if file.is_file()]
        if len(there) > 1:
            raise LamellaError(f"{folder} has {' and '.join(file.name for file in there)} for one split. Keep one.")
        if there:
            found[split] = there[0]
    if "train" not in found or len(found) < 2:
        raise LamellaError(
            f"{folder} needs a train file and a validation or test file, named like train.jsonl, validation.csv or "
            f"test.parquet. To have one file split, name it: file:{folder.name}/rows.jsonl."
        )
    return found


def stated_source(folder: Path) -> dict[str, str]:
    """The `- key: value` lines of a folder's `SOURCE.md`."""
    path = folder / "SOURCE.md"
    if not path.is_file():
        return {}
    lines = (line[2:].partition(": ") for line in path.read_text("utf-8").splitlines() if line.startswith("- "))
    return {key: value.strip() for key, separator, value in lines if separator}
