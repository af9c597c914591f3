"""From rows to splits: exact duplicates out, evaluation rows out of training, the same rows held out everywhere.

Rows are held out in the order of the SHA-256 of their group (the text itself, or the document, film or dialogue it
belongs to). So a split depends on neither a random generator nor a seed, and is the same on every machine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lamella.errors import LamellaError
from lamella.lab.data.task import METRICS, Task
from lamella.texts.rows import LABELLED, Row, TaskKind, hold_out, input_columns, sample_indices

if TYPE_CHECKING:
    from datasets import Dataset

Splits = dict[str, list[Row]]


_encode = json.JSONEncoder(ensure_ascii=False).encode


def _key(row: Row, columns: Sequence[str]) -> str:
    # options in another order are the same question
    cells = [sorted(row[column]) if column == "choices" else row[column] for column in columns]
    return _encode(cells)


def _question(kind: TaskKind, row: Row) -> tuple[str, ...]:
    """Columns by which two rows ask the same thing: the inputs, without label or answer."""
    inputs = input_columns(kind, set(row))
    return inputs[:1] if inputs in (("prompt", "completion"), ("source", "target")) else inputs


def telling_columns(kind: TaskKind, row: Row) -> tuple[str, ...]:
    """Columns by which a training row gives an evaluation row away.

    A prompt alone does not, because short ones such as "what?" recur in any dialogue.
    """
    inputs = input_columns(kind, set(row))
    return inputs[:1] if inputs == ("source", "target") else inputs


def without_duplicates(kind: TaskKind, rows: list[Row]) -> list[Row]:
    """The rows without exact repetitions (all inputs and the label equal), in their order."""
    if not rows:
        return rows
    columns = [*input_columns(kind, set(rows[0])), *(["label"] if kind in LABELLED else [])]
    return list({_key(row, columns): row for row in reversed(rows)}.values())[::-1]


def split_whole(
    kind: TaskKind,
    rows: list[Row],
    *,
    test: int,
    validation: int,
    group: Callable[[Row], str] | None = None,
    unit: str = "text",
) -> tuple[Splits, list[str]]:
    """Divide one body of rows into train, validation and test.

    Args:
        kind: the kind of the rows.
        rows: all of them.
        test: rows held out for the test (complete groups: at least so many).
        validation: rows held out of the rest.
        group: rows of one group stay in one split; by default rows with the same inputs.
        unit: the word for a group in the notes.
    """
    unique = without_duplicates(kind, rows)
    by = group or (lambda row: _key(row, _question(kind, row)))
    rest, tested = hold_out(unique, test, by)
    train, validated = hold_out(rest, validation, by, salt="validation")
    splits = {"train": train, "validation": validated, "test": tested}
    notes = [f"{len(rows) - len(unique):,} exact duplicates dropped"] if len(rows) > len(unique) else []
    notes.append(
        f"split here by {unit} in the order of its SHA-256, the same for every seed: "
        + ", ".join(f"{len(part):,} {name}" for name, part in splits.items() if part)
    )
    return splits, notes


def complete_published(kind: TaskKind, splits: Splits) -> tuple[Splits, list[str]]:
    """Published splits, with a validation split held out of train where there is none.

    A validation split without a test split becomes the test split. Published evaluation rows stay exactly as they are,
    so that scores compare with published ones.
    """
    done, notes = dict(splits), []
    if "test" not in done:
        done["test"] = done.pop("validation")
        notes.append("the published validation rows are the test split")
    done["train"] = without_duplicates(kind, splits["train"])
    if dropped := len(splits["train"]) - len(done["train"]):
        notes.append(f"{dropped:,} exact duplicates dropped from train")
    if "validation" not in done:
        count = min(500, max(1, len(done["train"]) // 10))
        done["train"], done["validation"] = hold_out(
            done["train"], count, lambda row: _key(row, _question(kind, row)), salt="validation"
        )
        notes.append(
            f"no validation split is published beside the test rows: {len(done['validation']):,} rows held out of "
            "train in the order of the SHA-256 of their text, the same for every seed"
        )
    return done, notes


def without_overlap(kind: TaskKind, splits: Splits) -> tuple[Splits, list[str]]:
    """Drop train rows that occur in validation or test, and validation rows that occur in test, by any label."""
    seen: set[str] = set()
    clean, notes = dict(splits), []
    for name in ("test", "validation", "train"):
        if name not in splits or not splits[name]:
            continue
        columns = telling_columns(kind, splits[name][0])
        keys = [_key(row, columns) for row in splits[name]]
        clean[name] = [row for row, key in zip(splits[name], keys, strict=True) if key not in seen]
        if dropped := len(splits[name]) - len(clean[name]):
            against = "the test split" if name == "validation" else "an evaluation split"
            notes.append(f"{dropped:,} {name} rows dropped because they also occur in {against}")
        seen.update(keys)
    return clean, notes


def sample_rows(split: Dataset, count: int) -> Dataset:
    """At most ``count`` rows of a split, always the same ones and in the split's order: packed prose stays prose."""
    return split if count >= len(split) else split.select(sample_indices(len(split), count))


def build_task(
    name: str,
    kind: TaskKind,
    splits: Splits,
    *,
    label_names: tuple[str, ...] = (),
    metric: str | None = None,
    source: str,
    licence: str,
    notes: Sequence[str] = (),
    seed: int = 0,
) -> Task:
    """A `Task` of finished splits: overlap dropped, columns reduced to the kind's, train rows ordered by `seed`.

    Running prose keeps its order, because packing joins neighbouring rows.

    Raises:
        LamellaError: all rows of a split occur in another that is for evaluation.
    """
    given = splits
    splits, overlap = without_overlap(kind, given)
    if gone := [split for split, rows in given.items() if rows and not splits[split]]:
        raise LamellaError(
            f"All {len(given[gone[0]]):,} {gone[0]} rows of '{name}' also occur among those that test it, so that none "
            "is left. Give it rows of its own."
        )
    ordered = {split: splits[split] for split in ("train", "validation", "test") if splits.get(split)}
    if "train" in ordered and not (kind == "causal-lm" and "text" in ordered["train"][0]):
        ordered["train"] = random.Random(seed).sample(ordered["train"], len(ordered["train"]))
    return Task(
        name=name,
        kind=kind,
        splits={split: _dataset(kind, rows) for split, rows in ordered.items()},
        label_names=label_names,
        metric=metric or METRICS[kind],
        source=source,
        licence=licence,
        notes=(*notes, *overlap),
    )


def _dataset(kind: TaskKind, rows: list[Row]) -> Dataset:
    from datasets import Dataset

    columns = [*input_columns(kind, set(rows[0])), *(["label"] if kind in LABELLED else [])]
    return Dataset.from_dict({column: [row[column] for row in rows] for column in columns})
