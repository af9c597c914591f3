"""Rows of text: their kind, told by their columns, with every cell checked; an error names file, row and column."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lamella.errors import LamellaError

TaskKind: TypeAlias = Literal[
    "classification", "pair-classification", "multiple-choice", "regression", "causal-lm", "seq2seq"
]
Row: TypeAlias = dict[str, Any]

# Column sets a kind may have: the inputs, then whether a label column stands beside them.
FORMS: dict[TaskKind, tuple[tuple[str, ...], ...]] = {
    "classification": (("text",),),
    "pair-classification": (("text1", "text2"),),
    "multiple-choice": (("question", "choices"),),
    "regression": (("text1", "text2"), ("text1",)),
    "causal-lm": (("messages",), ("prompt", "completion"), ("text",)),
    "seq2seq": (("source", "target"),),
}
LABELLED: frozenset[str] = frozenset({"classification", "pair-classification", "multiple-choice", "regression"})
_MANY = 10  # labels that few rows may have
_FIRST_TO_FIT: tuple[TaskKind, ...] = (
    "causal-lm",
    "seq2seq",
    "multiple-choice",
    "pair-classification",
    "classification",
)


def input_columns(kind: TaskKind, columns: set[str]) -> tuple[str, ...]:
    """The text columns of a row of this kind, for the form whose columns are all present; empty where none fits."""
    return next((form for form in FORMS[kind] if columns.issuperset(form)), ())


def hold_out(
    rows: list[Row], count: int, group: Callable[[Row], str], salt: str = "test"
) -> tuple[list[Row], list[Row]]:
    """Splits rows into (the rest, held out), in their order: groups are held out until ``count`` rows are reached.

    Groups are taken in the order of the SHA-256 of their name, so that the same rows are held out on every machine.
    """
    names = [group(row) for row in rows]
    sizes = Counter(names)
    held: set[str] = set()
    size = 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(f"lamella {salt} {name}".encode()).digest()):
        if size >= count:
            break
        held.add(name)
        size += sizes[name]
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row, name in zip(rows, names, strict=True):
        sides[name in held].append(row)
    return sides


def sample_indices(size: int, count: int | None, seed: int = 0) -> list[int]:
    """At most ``count`` of ``size`` rows, in their own order; all of them where ``count`` is None."""
    return (
        list(range(size)) if count is None or count >= size else sorted(random.Random(seed).sample(range(size), count))
    )


@dataclass(frozen=True)
class Table:
    """Rows of one split as they were read.

    Attributes:
        origin: what an error calls them: a file name, or a hub id and split.
        rows: counted from 1 in errors; in JSON lines the row number is the line number.
        names: label names that the source states, in the order of its integer labels.
    """

    origin: str
    rows: list[Row]
    names: tuple[str, ...] = ()

    def complain(self, index: int, column: str, what: str) -> LamellaError:
        """The error for one cell."""
        return LamellaError(f"{self.origin}, row {index + 1}, column {column!r}: {what}")


def read_columns(tables: Mapping[str, Table]) -> tuple[TaskKind, dict[str, list[Row]], tuple[str, ...], list[str]]:
    """Kind, checked rows of each split, label names, and notes, from raw tables.

    The kind follows from the columns: see `FORMS`. Float labels mean regression; integer or text labels mean
    classification, their names taken from a `label_name` column where there is one.

    Raises:
        LamellaError: columns that fit no kind; a row with a missing, null, empty or ill-typed cell; labels of mixed
            types; a label that training does not have.
    """
    first = next(iter(tables.values()))
    present = {column for row in first.rows for column in row}
    kind = _kind(first.origin, present)
    _refuse_misnamed(first.origin, present)
    if kind in ("classification", "pair-classification") and _floats(tables):
        _refuse_whole_floats(tables)
        kind, present = "regression", present - {"text"} | {"text1"}
        tables = {
            split: Table(table.origin, [_text1(row) for row in table.rows], table.names)
            for split, table in tables.items()
        }
    columns = input_columns(kind, present)
    for table in tables.values():
        for index, row in enumerate(table.rows):
            for column in columns:
                _check_input(table, index, column, row.get(column))
    named = " and ".join(columns) + (" and label" if kind in LABELLED else "")
    notes = [f"read as {kind}, from the columns {named}"]
    if unread := present - {*columns, "label", "label_name"}:
        notes.append(f"columns that are not read: {_list(unread)}")
    rows, names = _labels(kind, tables)
    return kind, rows, names, notes


def check_published(kind: TaskKind, table: Table, label_names: Sequence[str]) -> None:
    """Check rows of a known kind, whose integer labels are numbered as in `label_names`.

    Raises:
        LamellaError: the columns of the kind are missing, or a cell cannot be used.
    """
    columns = input_columns(kind, {column for row in table.rows for column in row})
    if not columns:
        listed = _list({column for row in table.rows for column in row})
        raise LamellaError(f"{table.origin} has the columns {listed}, which do not make a {kind} task.")
    for index, row in enumerate(table.rows):
        for column in columns:
            _check_input(table, index, column, row.get(column))
        if kind in LABELLED:
            _check_label(kind, table, index, row, 0)
        if label_names and row["label"] not in range(len(label_names)):
            raise table.complain(index, "label", f"{row['label']!r} is none of 0 to {len(label_names) - 1}.")


def _first_to_fit(present: set[str]) -> TaskKind | None:
    for kind in _FIRST_TO_FIT:
        # text with a label is classification; text without one is prose
        form = input_columns(kind, present)
        if form and not (kind == "causal-lm" and form == ("text",) and "label" in present):
            return kind
    return None


def _kind(origin: str, present: set[str]) -> TaskKind:
    kind = _first_to_fit(present)
    if kind is not None:
        if kind in LABELLED and "label" not in present:
            raise LamellaError(f"{origin} has the columns {_list(present)} but no 'label' column.")
        return kind
    if present.issuperset(("text1", "label")):
        return "regression"
    wanted = "; ".join(
        f"{kind}: {' or '.join(', '.join([*form, *(['label'] if kind in LABELLED else [])]) for form in forms)}"
        for kind, forms in FORMS.items()
    )
    raise LamellaError(
        f"{origin} has the columns {_list(present)}, which fit no task. Rename them to fit one. {wanted}."
    )


def _refuse_misnamed(origin: str, present: set[str]) -> None:
    """Raises over a column without which the rows are another task, and which is almost called as it has to be."""
    known = {"label", *(column for forms in FORMS.values() for form in forms for column in form)}
    for column in sorted(map(str, present - known)):
        plain = column.strip().casefold()
        meant = next((name for name in (plain, plain.removesuffix("s")) if name in known - present), None)
        if meant is not None and _first_to_fit(present | {meant}) != _first_to_fit(present):
            raise LamellaError(f"{origin} has a column {column!r}, which is read if it is called {meant!r}. Rename it.")


def _list(columns: set[Any]) -> str:
    return ", ".join(sorted(map(str, columns))) or "(none)"


def _floats(tables: Mapping[str, Table]) -> bool:
    return any(isinstance(row.get("label"), float) for table in tables.values() for row in table.rows)


def _refuse_whole_floats(tables: Mapping[str, Table]) -> None:
    """Labels such as 0.0 and 1.0 may be classes, as pandas writes them beside a gap, or amounts."""
    labels = [row.get("label") for table in tables.values() for row in table.rows]
    if all(isinstance(label, int) or (isinstance(label, float) and label.is_integer()) for label in labels):
        origin = next(iter(tables.values())).origin
        seen = ", ".join(map(str, sorted({label for label in labels if isinstance(label, float)})[:5]))
        raise LamellaError(
            f"{origin}: all labels are whole numbers, written with a point ({seen}), which may be classes or amounts. "
            "Write classes as 0, 1, ... or as names; for amounts describe the file in a task's YAML with "
            "kind: regression."
        )


def _text1(row: Row) -> Row:
    return {**{k: v for k, v in row.items() if k != "text"}, "text1": row["text"]} if "text" in row else row


def _check_input(table: Table, index: int, column: str, value: Any) -> None:
    if value is None:
        raise table.complain(index, column, "missing or null. Fill it in or delete the row.")
    if column == "choices":
        if not isinstance(value, list) or len(value) < 2:
            raise table.complain(
                index, column, "needs a list of at least two texts (CSV has no lists: use JSON lines)."
            )
        for choice in value:
            _check_text(table, index, column, choice)
    elif column == "messages":
        _check_messages(table, index, value)
    else:
        _check_text(table, index, column, value)


def _check_text(table: Table, index: int, column: str, value: Any) -> None:
    if not isinstance(value, str):
        raise table.complain(index, column, f"{value!r} is not text. Write it as a string.")
    if not value.strip():
        raise table.complain(index, column, "empty. Fill it in or delete the row.")
    _check_letters(table, index, column, value)


def _check_letters(table: Table, index: int, column: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise table.complain(
            index,
            column,
            f"letter {error.start + 1} is half of a surrogate pair ({text[error.start]!a}), which is no text. Escape "
            "letters outside the basic plane as two \\u halves, or write them in UTF-8.",
        ) from error


def _check_messages(table: Table, index: int, value: Any) -> None:
    whole = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )
    if not whole:
        raise table.complain(index, "messages", 'needs a list of {"role": ..., "content": ...} with texts.')
    for message in value:
        _check_letters(table, index, "messages", message["role"] + message["content"])
    if not any(message["role"] == "assistant" and message["content"].strip() for message in value):
        raise table.complain(index, "messages", "no assistant turn, so there is nothing to learn. Delete the row.")


def _labels(kind: TaskKind, tables: Mapping[str, Table]) -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """Rows with checked labels, and the label names."""
    if kind not in LABELLED:
        return {split: table.rows for split, table in tables.items()}, ()
    for table in tables.values():
        for index, row in enumerate(table.rows):
            _check_label(kind, table, index, row, next(iter(tables.values())).rows[0].get("label"))
    if kind == "regression":
        rows = {s: [{**row, "label": float(row["label"])} for row in table.rows] for s, table in tables.items()}
        return rows, ()
    if kind == "multiple-choice":
        return {split: table.rows for split, table in tables.items()}, ()
    return _numbered(tables)


def _check_label(kind: TaskKind, table: Table, index: int, row: Row, first: Any) -> None:
    label = row.get("label")
    if label is None or label == "":
        raise table.complain(index, "label", "missing, null or empty. Fill it in or delete the row.")
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        raise table.complain(index, "label", f"{label!r} is neither a number nor text.")
    if isinstance(label, str) != isinstance(first, str):
        raise table.complain(
            index, "label", f"{label!r} mixes with labels like {first!r}. Use text or numbers throughout."
        )
    if kind == "regression" and (isinstance(label, str) or not abs(label) <= sys.float_info.max):
        raise table.complain(index, "label", f"{label!r} is not a finite number.")
    if kind == "multiple-choice":
        count = len(row["choices"])
        if not isinstance(label, int) or not 0 <= label < count:
            raise table.complain(index, "label", f"{label!r} is not the index of one of the {count} choices (from 0).")


def _numbered(tables: Mapping[str, Table]) -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """Labels of classification as 0, 1, ... in the order of their sorted values, with names."""
    training = next(iter(tables.values()))
    names = _label_names(tables)
    values: Sequence[Any] = sorted({row["label"] for row in training.rows} | set(range(len(training.names))))
    if len(values) < 2:
        raise LamellaError(f"{training.origin}: every row has the label {values[0]!r}. At least two labels are needed.")
    _refuse_alike(training, [value for value in values if isinstance(value, str)])
    if len(values) > max(_MANY, len(training.rows) // 2) and not training.names:
        raise LamellaError(
            f"{training.origin}: {len(training.rows)} rows have {len(values)} labels, such as {values[0]!r} and "
            f"{values[1]!r}, so that there are no classes. Write amounts as numbers with a point, as 1.5."
        )
    number = {value: index for index, value in enumerate(values)}
    for table in tables.values():
        for index, row in enumerate(table.rows):
            if row["label"] not in number:
                known = ", ".join(map(repr, values[:10])) + (", ..." if len(values) > 10 else "")
                raise table.complain(index, "label", f"{row['label']!r} is unknown: {training.origin} has {known}.")
    rows = {s: [{**row, "label": number[row["label"]]} for row in table.rows] for s, table in tables.items()}
    return rows, tuple(names.get(value, str(value)) for value in values)


def _refuse_alike(training: Table, labels: Sequence[str]) -> None:
    """Raises over a label that is written in two ways, which would be two classes."""
    written: dict[str, str] = {}
    for label in labels:
        other = written.setdefault(" ".join(label.split()).casefold(), label)
        if other != label:
            raise LamellaError(
                f"{training.origin}: the labels {other!r} and {label!r} differ in white space or capitals alone. Write "
                "them alike, or name the two classes otherwise."
            )


def _label_names(tables: Mapping[str, Table]) -> dict[Any, str]:
    """The name of each label, where the source has one."""
    names: dict[Any, str] = dict(enumerate(next(iter(tables.values())).names))
    for table in tables.values():
        for index, row in enumerate(table.rows):
            name = row.get("label_name")
            if isinstance(name, str) and names.setdefault(row["label"], name) != name:
                raise table.complain(
                    index,
                    "label_name",
                    f"label {row['label']!r} is called {name!r} here and {names[row['label']]!r} before.",
                )
    return names
