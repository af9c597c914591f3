"""Rows from files: prose, JSON lines, CSV and Parquet.

JSON lines are read here and not by a library, so that an error names the row, and so that they need none.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from pathlib import Path
from typing import Any

from lamella.errors import LamellaError, optional_module
from lamella.texts.rows import Row

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", ".txt")


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; those of a .txt file are the texts between its blank lines.

    Cells of CSV are text, except for a column ``label`` that is a number in every row.

    Raises:
        LamellaError: missing file, unknown suffix, content of another format, a line that is not a JSON object, or no
            rows; or pandas or pyarrow is needed and absent.
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
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise LamellaError(f"{path.name} cannot be read as UTF-8 {suffix}: {error}.") from error
    if not rows:
        raise LamellaError(f"{path.name} has no {'text' if suffix == '.txt' else 'rows'}.")
    return rows


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")


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


def read_csv(path: Path) -> list[Row]:
    """Rows of a CSV of any name, also packed (.gz, .bz2, .zip).

    Raises:
        LamellaError: pandas is absent, or cannot read it.
    """
    pandas = optional_module("pandas", f"Reading {path.name}")
    try:
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
    except pandas.errors.EmptyDataError:
        return []
    except pandas.errors.ParserError as error:
        raise LamellaError(f"{path.name} cannot be read as CSV: {error}.") from error
    for number in (int, float):
        with contextlib.suppress(KeyError, ValueError):
            frame["label"] = pandas.Series([number(label) for label in frame["label"]], dtype=object)
            break
    return [dict(zip(frame.columns, cells, strict=True)) for cells in frame.to_numpy(dtype=object).tolist()]


def _read_parquet(path: Path) -> list[Row]:
    pyarrow: Any = optional_module("pyarrow", f"Reading {path.name}")
    parquet: Any = optional_module("pyarrow.parquet", f"Reading {path.name}")
    try:
        return list(parquet.read_table(path).to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise LamellaError(f"{path.name} is not a readable Parquet file: {error}.") from error
