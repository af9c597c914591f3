"""Data frames and settings laid out as tables of finished text; the templates only draw them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lamella.errors import LamellaError
from lamella.lab.report.formatting import as_interval, is_missing, is_number, number_format, setting_text


@dataclass(frozen=True)
class Cell:
    """One cell: its text and its kind, "number", "text" or "missing"."""

    text: str
    kind: str


@dataclass(frozen=True)
class Table:
    """A captioned table; the first cell of a row names it."""

    caption: str
    columns: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Section:
    """One branch of the settings: a title and its (name, text) rows."""

    title: str
    rows: tuple[tuple[str, str], ...]


def frame_table(frame: pd.DataFrame, caption: str, missing: str, first: str = "method") -> Table:
    """Lay out a frame, a row per method.

    Args:
        frame: its first column is "method", or what ``first`` says; a cell is a number, text, a (low, high) pair or
            missing.
        caption: what the table shows.
        missing: the words for a cell without a value.
        first: name of the column that names the rows.

    Raises:
        LamellaError: another column is the first.
    """
    if len(frame.columns) == 0 or frame.columns[0] != first:
        names = ", ".join(map(repr, frame.columns)) or "none"
        raise LamellaError(f"The first column of the table '{caption}' must be '{first}'; its columns are: {names}.")
    columns = [_column_cells(list(frame.iloc[:, at]), missing) for at in range(len(frame.columns))]
    heads = tuple(Cell(str(name), _kind(cells)) for name, cells in zip(frame.columns, columns, strict=True))
    return Table(caption, heads, tuple(zip(*columns, strict=True)))


def _column_cells(values: list[Any], missing: str) -> list[Cell]:
    number = number_format(values)

    def cell(value: Any) -> Cell:
        interval = as_interval(value)
        if interval:
            return Cell(f"{number(interval[0])} to {number(interval[1])}", "number")
        if is_missing(value):
            return Cell(missing, "missing")
        if isinstance(value, bool | np.bool_):
            return Cell("yes" if value else "no", "text")
        return Cell(number(value), "number") if is_number(value) else Cell(str(value), "text")

    return [cell(value) for value in values]


def _kind(cells: list[Cell]) -> str:
    """A column's head stands over its numbers when it has any."""
    return "number" if any(cell.kind == "number" for cell in cells) else "text"


def settings_sections(settings: Mapping[str, Any]) -> tuple[Section, ...]:
    """One section per nested mapping at the top, deeper names dotted; what is not nested comes first as "general"."""
    nested = {key: value for key, value in settings.items() if isinstance(value, Mapping) and value}
    general = {key: value for key, value in settings.items() if key not in nested}
    sections = {"general": general, **nested} if general else nested
    return tuple(Section(str(title), tuple(_leaves(branch))) for title, branch in sections.items())


def _leaves(branch: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in branch.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", setting_text(value)
