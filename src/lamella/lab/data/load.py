"""One name, one task: where a name is looked up, and what becomes of its rows."""

from __future__ import annotations

import difflib
import gc
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lamella.errors import LamellaError
from lamella.lab.data.derived import JOINT, as_text, fewer, held, joint, parts_of, stage, union
from lamella.lab.data.entry import FOLDER, Hub, TaskEntry, read_entry
from lamella.lab.data.shapes import SHAPES
from lamella.lab.data.sources import MIRROR, Raw, mirror_folder, read_source
from lamella.lab.data.splitting import Splits, build_task, complete_published, split_whole
from lamella.lab.data.task import Task
from lamella.texts.files import SUFFIXES
from lamella.texts.rows import Row, Table, TaskKind, check_published, input_columns, read_columns

KNOWN_TASKS: tuple[str, ...] = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
_OLD_HUB_NAMES = {"glue": "nyu-mll/glue"}
_SPLIT_FILES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


def load_task(name: str, *, seed: int = 0) -> Task:
    """Load a task by name.

    Args:
        name: one of `KNOWN_TASKS` (demo tasks come from PyPI, public ones from the folder that the environment
            variable `LAMELLA_DATA` names or from the hub), `blitzer/books`, `bbh/TASK`, the path of a task's YAML file,
            `file:PATH` (one file, or a folder with train, validation and test files), `hub:REPOSITORY[/CONFIG]`, or
            `mirror:FOLDER` for a folder of the mirror as it stands. `trec` always means the demo task; `mirror:trec`
            the mirror's copy. Made of these: `NAME@800` has at most so many training rows, `NAME@800/50` also at most
            so many validation rows, `mix:NAME+NAME` is their union, and `held:NAME` the validation rows alone, as a
            small task to fit on what was trained on the others. `text:NAME` is a classification as a question for a
            decoder. `joint:NAME+NAME` are several tasks for one model, each with a head and scores of its own;
            `learn:2:NAME+NAME` is the second stage of learning them one after the other, and `learn:2/50:NAME+NAME`
            learns 50 rows of each earlier one again.
        seed: order of the training rows; running prose keeps its order. It never changes which rows are in a split.

    Raises:
        LamellaError: the name is unknown, its rows cannot be fetched, or a row cannot be used.
    """
    scheme, colon, rest = name.partition(":")
    if colon and rest and scheme == "mix":
        return union(name, [load_task(part.strip(), seed=seed) for part in rest.split("+")], seed)
    if colon and rest and scheme == "held":
        return held(name, load_task(rest, seed=seed), seed)
    if colon and rest and scheme == "text":
        return as_text(name, load_task(rest, seed=seed))
    if parts := parts_of(name):
        return joint(name, [load_task(part, seed=seed) for part in parts])
    if staged := re.fullmatch(r"learn:(\d+)(?:/(\d+))?:(.+)", name):
        number, rehearsed, several = staged.groups()
        return stage(name, load_task(f"{JOINT}{several}", seed=seed), int(number), int(rehearsed or 0))
    if counted := re.fullmatch(r"(.+)@(\d+)(?:/(\d+))?", name):
        base, *rows = counted.groups()
        return fewer(name, load_task(base, seed=seed), *(int(count) for count in rows if count))
    if (known := _known(name)) is not None:
        path, subset = known
        return _load(name, read_entry(path), path.parent, subset, seed)
    if colon and rest and scheme == "hub":
        return _load(name, _entry_of_hub(rest), Path(), "", seed)
    if colon and rest and scheme in ("file", "mirror"):
        path = Path(rest).expanduser() if scheme == "file" else _mirror(name, rest)
        return _load(name, _entry_of_files(path), path if path.is_dir() else path.parent, "", seed)
    stem = name.partition("/")[0]
    near = difflib.get_close_matches(stem, KNOWN_TASKS, n=3, cutoff=0.5)
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    raise LamellaError(
        f"There is no task {name!r}. {meant}Known tasks: {', '.join(KNOWN_TASKS)}; or the path of a task's YAML file, "
        "file:PATH, hub:REPOSITORY, mirror:FOLDER, mix:TASK+TASK, joint:TASK+TASK, held:TASK, text:TASK."
    )


def _known(name: str) -> tuple[Path, str] | None:
    """The YAML file of a task by its name or path, and the subset that is asked for."""
    if match := re.fullmatch(r"(.+\.ya?ml)(?:/(.+))?", name):
        return Path(match[1]).expanduser(), match[2] or ""
    stem, _, subset = name.partition("/")
    return (FOLDER / f"{stem}.yaml", subset) if stem in KNOWN_TASKS else None


def _mirror(name: str, folder: str) -> Path:
    path = mirror_folder(folder)
    if path is None:
        root = os.environ.get(MIRROR)
        said = f"{root} has no folder {folder}" if root else f"the environment variable {MIRROR} is not set"
        raise LamellaError(f"{name} names a folder of the local mirror, but {said}.")
    return path


def _entry_of_files(path: Path) -> TaskEntry:
    """One file of all rows, or a folder with a file a split."""
    licence = "not stated (local files)"
    if not path.is_dir():
        return TaskEntry(files={"all": path.name}, licence=licence)
    files: dict[str, str] = {}
    for split, stems in _SPLIT_FILES.items():
        names = [f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        there = [name for name in names if (path / name).exists()]
        if len(there) > 1:
            raise LamellaError(f"{path} has {' and '.join(there)} for one split. Keep one.")
        if there:
            files[split] = there[0]
    if "train" not in files or len(files) < 2:
        raise LamellaError(
            f"{path} needs a train file and a validation or test file, named like train.jsonl, validation.csv or "
            f"test.parquet. To have one file split, name it: file:{path.name}/rows.jsonl."
        )
    return TaskEntry.model_validate({"files": files, "licence": licence})


def _entry_of_hub(where: str) -> TaskEntry:
    """A dataset of the hub: one of `KNOWN_TASKS` is read as such; any other needs columns as in `Task.splits`."""
    head, *tail = where.split("/")
    repository, *config = [*_OLD_HUB_NAMES.get(head, head).split("/"), *tail]
    if config:
        repository, *config = f"{repository}/{config[0]}", *config[1:]
    hub = Hub(repository=repository, config="/".join(config) or None)
    for known in map(read_entry, sorted(FOLDER.glob("*.yaml"))):
        if known.hub is not None and (known.hub.repository, known.hub.config) == (hub.repository, hub.config):
            return known.model_copy(update={"files": {}, "folder": None})
    return TaskEntry(hub=hub, licence="stated on the dataset's page")


@contextmanager
def _uncollected() -> Iterator[None]:
    """Rows are no garbage: to look through 100,000 of them again and again takes longer than to read them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def _load(name: str, entry: TaskEntry, beside: Path, subset: str, seed: int) -> Task:
    """The task that an entry describes."""
    raw = read_source(name.partition("/")[0], entry, beside)
    if entry.kind is None:
        kind, splits, label_names, notes = _by_columns(raw)
    else:
        kind, splits, label_names, notes = entry.kind, *_by_entry(name, entry, entry.kind, raw)
    splits = _selected(name, entry, subset, splits)
    done, said = _divided(name, entry, splits, kind)
    return build_task(
        name,
        kind,
        done,
        label_names=label_names,
        metric=entry.metric,
        source=raw.source,
        licence=raw.licence or entry.licence or "not stated",
        notes=[*([entry.caution] if entry.caution else []), *raw.notes, *notes, *said],
        seed=seed,
    )


def _by_columns(raw: Raw) -> tuple[TaskKind, Splits, tuple[str, ...], list[str]]:
    """Kind, rows, label names and notes of a source that says nothing but its columns."""
    named = {split: any("label" in row for row in rows) for split, rows in raw.splits.items()}
    if not named.get("train", True) and any(named.values()):
        raise LamellaError(
            f"{raw.origins['train']} has no column 'label', and another split has one: as text without labels, the "
            "task would be another. Add the column, or take it out of every split."
        )
    labelled = {split: rows for split, rows in raw.splits.items() if any(row.get("label") != -1 for row in rows)}
    if not labelled:
        raise LamellaError(f"{next(iter(raw.origins.values()))}: every row has the label -1, which stands for none.")
    tables = {split: Table(raw.origins[split], rows, raw.names) for split, rows in labelled.items()}
    kind, splits, label_names, notes = read_columns(tables)
    unlabelled = [split for split in raw.splits if split not in labelled]
    return (
        kind,
        splits,
        label_names,
        [*notes, *(f"the {one} split has no labels and is left out" for one in unlabelled)],
    )


def _by_entry(name: str, entry: TaskEntry, kind: TaskKind, raw: Raw) -> tuple[Splits, tuple[str, ...], list[str]]:
    """Rows, label names and notes of a source whose columns an entry explains."""
    splits, dropped = {}, 0
    for split, rows in raw.splits.items():
        shaped = list(_shaped(name, entry, raw, rows))
        columns = input_columns(kind, set(shaped[0])) if shaped and entry.drop_empty else ()
        splits[split] = [row for row in shaped if all(row[column].strip() for column in columns)]
        dropped += len(shaped) - len(splits[split])
        check_published(kind, Table(raw.origins[split], splits[split]), entry.labels)
    return splits, entry.labels, [f"{dropped:,} rows without text dropped"] if dropped else []


def _shaped(name: str, entry: TaskEntry, raw: Raw, rows: list[Row]) -> Iterable[Row]:
    """Rows with our columns, without those that the entry does not keep; labels of classes by number."""
    numbers = {label: number for number, label in enumerate(entry.labels)}
    try:
        for row in SHAPES[entry.shape](rows) if entry.shape else rows:
            ours = {entry.columns.get(column, column): value for column, value in row.items()}
            if all(ours[column] in values for column, values in entry.keep.items()):
                if entry.labels and isinstance(label := ours.get("label"), str):
                    ours["label"] = numbers[label] if label in numbers else int(label) if label.isdigit() else label
                yield ours
    except KeyError as error:
        raise LamellaError(f"{name}, from {raw.source}: a row has no column {error}.") from error


def _selected(name: str, entry: TaskEntry, subset: str, splits: Splits) -> Splits:
    """The rows of one subset; all of them when none is named and the task makes sense without."""
    stem = name.removesuffix(f"/{subset}")
    if entry.subset is None:
        if subset:
            raise LamellaError(f"{stem} has no subsets, so {name!r} names nothing. Use {stem!r}.")
        return splits
    column = entry.subset
    known = sorted({row[column] for rows in splits.values() for row in rows})
    if subset in known:
        return {split: [row for row in rows if row[column] == subset] for split, rows in splits.items()}
    if subset or "train" in entry.split:  # so few training rows are those of one subset
        said = f"{stem} has no {column} {subset!r}" if subset else f"{stem} is {len(known)} tasks"
        raise LamellaError(f"{said}. Choose one: {', '.join(f'{stem}/{one}' for one in known)}.")
    return splits


def _divided(name: str, entry: TaskEntry, splits: Splits, kind: TaskKind) -> tuple[Splits, list[str]]:
    """Train, validation and test rows, and how they were made."""
    if "all" not in splits:
        return complete_published(kind, splits)
    rows, sizes = splits["all"], entry.split
    test, validation = max(1, len(rows) // 5), max(1, len(rows) // 10)
    if sizes:
        validation = sizes.get("validation", 0)
        test = sizes["test"] if "test" in sizes else len(rows) - sizes["train"] - validation
    column = entry.group
    group = None if column is None else lambda row: str(row[column])
    done, notes = split_whole(kind, rows, test=test, validation=validation, group=group, unit=entry.unit)
    if not sizes and not all(done.values()):
        raise LamellaError(f"{name} has too few different rows to fill train, validation and test. Add rows.")
    return done, notes
