"""Rows from local files: JSON lines, CSV and Parquet, one file or one file a split."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

from lamella.errors import LamellaError
from lamella.lab.data.assets import sha256_of
from lamella.lab.data.columns import Table, read_columns
from lamella.lab.data.splitting import build_task, complete_published, split_whole
from lamella.lab.data.task import Row, Task

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
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


def read_rows(path: Path) -> list[Row]:
    """All rows of a .jsonl, .csv or .parquet file (the first two also gzipped).

    Raises:
        LamellaError: missing file, unknown suffix, a line that is not a JSON object, or no rows.
    """
    if not path.is_file():
        raise LamellaError(f"There is no file {path}. Give file:PATH with the path of a {', '.join(SUFFIXES)} file.")
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise LamellaError(f"{path.name} is none of {', '.join(SUFFIXES)}. Convert it to one of these.")
    try:
        if suffix == ".parquet":
            rows = _read_parquet(path)
        else:
            content = gzip.decompress(path.read_bytes()) if suffix.endswith(".gz") else path.read_bytes()
            text = content.decode("utf-8-sig")
            rows = _read_csv(text) if suffix.startswith(".csv") else _read_jsonl(text, path.name)
    except LamellaError:
        raise
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise LamellaError(f"{path.name} cannot be read as UTF-8 {suffix}: {error}.") from error
    if not rows:
        raise LamellaError(f"{path.name} has no rows.")
    return rows


def _read_jsonl(text: str, name: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            said = "is empty" if not line.strip() else f"is not JSON ({error.msg} at column {error.colno})"
            raise LamellaError(f"{name}, row {number} {said}. Each line must hold one JSON object.") from error
        if not isinstance(row, dict):
            raise LamellaError(f"{name}, row {number} is a {type(row).__name__}. Each line must hold one JSON object.")
        rows.append(row)
    return rows


def _read_csv(text: str) -> list[Row]:
    rows: list[Row] = [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)]
    for row in rows:
        row.pop(None, None)  # type: ignore[call-overload]  # cells beyond the header
    for convert in (int, float):  # CSV has no types: a label column is numeric when every cell is
        try:
            numbers = [convert(row["label"]) for row in rows]
        except (KeyError, TypeError, ValueError):
            continue
        return [{**row, "label": number} for row, number in zip(rows, numbers, strict=True)]
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise LamellaError(f"{path.name} is not a readable Parquet file: {error}.") from error
