"""Rows from files: prose, JSON lines, CSV and Parquet.

JSON lines and CSV are read by the standard library's readers, so that an error names the row and no cell is guessed at.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import re
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

from lamella.errors import LamellaError, optional_module
from lamella.texts.rows import Row

# Labels that are numbers, and not names made of digits such as 007 or 1_000.
_NUMBERS: dict[type[int | float | str], re.Pattern[str]] = {
    int: re.compile(r"-?(0|[1-9]\d*)", re.ASCII),
    float: re.compile(r"-?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?", re.ASCII),
}

_MISSING = frozenset({"", "nan", "na", "n/a", "<na>", "null", "none"})  # as programs write a cell without a value

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", ".txt")


def _unzip(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        (only,) = packed.namelist()
        return packed.read(only)


_PACKINGS = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".zip": _unzip}


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; those of a .txt file are the texts between its blank lines.

    Cells of CSV are text, except for a column ``label`` that is a number in every row.

    Raises:
        LamellaError: missing file, unknown suffix, content of another format, a line that is not a JSON object, or no
            rows; or pyarrow is needed and absent.
    """
    if not path.is_file():
        raise LamellaError(f"There is no file {path}. Give the path of a {', '.join(SUFFIXES)} file.")
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise LamellaError(f"{path.name} is none of {', '.join(SUFFIXES)}. Convert it to one of these.")
    try:
        if suffix == ".parquet":
            rows = _read_parquet(path)
        elif suffix.startswith(".csv"):
            rows = read_csv(path)
        elif suffix == ".txt":
            rows = [{"text": part.strip()} for part in re.split(r"\n\s*\n", _decoded(path)) if part.strip()]
        else:
            rows = _read_jsonl(_decoded(path), path.name)
    except OSError as error:
        raise LamellaError(f"{path.name} cannot be read: {error.strerror or error}.") from error
    if not rows:
        raise LamellaError(f"{path.name} has no {'text' if suffix == '.txt' else 'rows'}.")
    return rows


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    if unpack := _PACKINGS.get(path.suffix):
        try:
            content = unpack(content)
        except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
            raise LamellaError(f"{path.name} cannot be unpacked as {path.suffix}: {error}.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise LamellaError(
            f"{path.name}, line {line} cannot be read as UTF-8 ({error.reason}: 0x{content[error.start]:02x}). "
            "Save the file as UTF-8."
        ) from error


def _read_jsonl(text: str, name: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        try:
            row = json.loads(line, object_pairs_hook=_each_once)
        except (ValueError, RecursionError) as error:
            why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            said = "is empty" if not line.strip() else f"is not JSON ({why})"
            raise LamellaError(f"{name}, row {number} {said}. Each line must hold one JSON object.") from error
        if not isinstance(row, dict):
            raise LamellaError(f"{name}, row {number} is a {type(row).__name__}. Each line must hold one JSON object.")
        rows.append(row)
    return rows


def _each_once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return row


def read_csv(path: Path) -> list[Row]:
    """Rows of a CSV of any name, also packed (.gz, .bz2, .zip).

    Raises:
        LamellaError: it is not UTF-8, a quote is not closed, a column is named twice, or a row has too many or too few
            cells.
    """
    csv.field_size_limit(sys.maxsize)  # texts may be longer than the 131,072 letters that it allows
    lines = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    try:
        header, rows = next(lines, []), [cells for cells in lines if cells]
    except csv.Error as error:
        raise LamellaError(f"{path.name}, line {lines.line_num} cannot be read as CSV: {error}.") from error
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise LamellaError(f"{path.name} has two columns named {twice!r}. Rename one.")
    for number, cells in enumerate(rows, start=1):
        if len(cells) != len(header):
            raise LamellaError(
                f"{path.name}, row {number} has {len(cells)} cells, and the header has {len(header)} columns. Put "
                "texts that hold commas or line breaks into quotes."
            )
    table: list[Row] = [dict(zip(header, cells, strict=True)) for cells in rows]
    labels = [row["label"] for row in table] if "label" in header else []
    told = [label for label in labels if label.strip().casefold() not in _MISSING]
    kind = next((kind for kind, written in _NUMBERS.items() if told and all(map(written.fullmatch, told))), str)
    if kind is not str:  # beside numbers such a word is none
        return [
            {**row, "label": kind(row["label"]) if row["label"].strip().casefold() not in _MISSING else None}
            for row in table
        ]
    return table


def _read_parquet(path: Path) -> list[Row]:
    pyarrow: Any = optional_module("pyarrow", f"Reading {path.name}")
    parquet: Any = optional_module("pyarrow.parquet", f"Reading {path.name}")
    try:
        return list(parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise LamellaError(f"{path.name} is not a readable Parquet file: {error}.") from error
