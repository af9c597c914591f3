"""One name, one task: where a name is looked up."""

from __future__ import annotations

import difflib
import os
import re

from lamella.errors import LamellaError
from lamella.lab.data.demo import DEMO_TASKS, load_demo
from lamella.lab.data.derived import fewer, held, union
from lamella.lab.data.files import load_file
from lamella.lab.data.origins import MIRROR, from_hub, mirror_folder
from lamella.lab.data.public import PUBLIC_TASKS, load_public
from lamella.lab.data.splitting import build_task, complete_published
from lamella.lab.data.task import Task
from lamella.texts.rows import Table, read_columns

KNOWN_TASKS: tuple[str, ...] = (*DEMO_TASKS, *PUBLIC_TASKS)
_OLD_HUB_NAMES = {"glue": "nyu-mll/glue"}


def load_task(name: str, *, seed: int = 0) -> Task:
    """Load a task by name.

    Args:
        name: one of `KNOWN_TASKS` (demo tasks come from PyPI, public ones from the folder that the environment
            variable `LAMELLA_DATA` names or from the hub), `blitzer/books`, `bbh/TASK`, `file:PATH` (one file, or a
            folder with train, validation and test files), `hub:REPOSITORY[/CONFIG]`, or `mirror:FOLDER` for a folder of
            the mirror as it stands. `trec` always means the demo task; `mirror:trec` the mirror's copy. Made of these:
            `NAME@800` has at most so many training rows, `NAME@800/50` also at most so many validation rows,
            `mix:NAME+NAME` is their union, and `held:NAME` the validation rows alone, as a small task to fit on what
            was trained on the others.
        seed: order of the training rows; running prose keeps its order. It never changes which rows are in a split.

    Raises:
        LamellaError: the name is unknown, its rows cannot be fetched, or a row cannot be used.
    """
    scheme, colon, rest = name.partition(":")
    stem = name.partition("/")[0]
    if colon and rest and scheme in ("mix", "held"):
        return _load_derived(name, scheme, rest, seed)
    if counted := re.fullmatch(r"(.+)@(\d+)(?:/(\d+))?", name):
        base, *rows = counted.groups()
        return fewer(name, load_task(base, seed=seed), *(int(count) for count in rows if count))
    if name in DEMO_TASKS:
        return load_demo(name, seed)
    if stem in PUBLIC_TASKS:
        return load_public(name, seed)
    if colon and rest and scheme == "file":
        return load_file(name, rest, seed=seed)
    if colon and rest and scheme == "hub":
        return _load_hub(name, rest, seed)
    if colon and rest and scheme == "mirror":
        return _load_mirror(name, rest, seed)
    near = difflib.get_close_matches(stem, KNOWN_TASKS, n=3, cutoff=0.5)
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    raise LamellaError(
        f"There is no task {name!r}. {meant}"
        f"Known tasks: {', '.join(KNOWN_TASKS)}; or file:PATH, hub:REPOSITORY, mirror:FOLDER, mix:TASK+TASK, held:TASK."
    )


def _load_derived(name: str, scheme: str, rest: str, seed: int) -> Task:
    if scheme == "held":
        return held(name, load_task(rest, seed=seed), seed)
    return union(name, [load_task(part.strip(), seed=seed) for part in rest.split("+")], seed)


def _load_hub(name: str, where: str, seed: int) -> Task:
    """A dataset of the hub. One of `PUBLIC_TASKS` is read as such; any other needs columns as in `Task.splits`."""
    head, *tail = where.split("/")
    repository, *config = [*_OLD_HUB_NAMES.get(head, head).split("/"), *tail]
    if config:
        repository, *config = f"{repository}/{config[0]}", *config[1:]
    place = (repository, "/".join(config) or None)
    known = next((stem for stem, public in PUBLIC_TASKS.items() if public.hub == place), None)
    if known:
        return load_public(known, seed, hub_only=True)
    raw = from_hub(*place)
    labelled = {split: rows for split, rows in raw.splits.items() if not all(row.get("label") == -1 for row in rows)}
    tables = {split: Table(f"{repository}, {split} split", rows, raw.names) for split, rows in labelled.items()}
    kind, splits, label_names, notes = read_columns(tables)
    notes += [f"the {split} split has no labels and is left out" for split in raw.splits if split not in labelled]
    done, said = complete_published(kind, splits)
    return build_task(
        name,
        kind,
        done,
        label_names=label_names,
        source=raw.source,
        licence="stated on the dataset's page",
        notes=[*notes, *said],
        seed=seed,
    )


def _load_mirror(name: str, folder: str, seed: int) -> Task:
    """A folder of the mirror, read like any local folder."""
    found = mirror_folder(folder)
    if found is None:
        root = os.environ.get(MIRROR)
        said = f"{root} has no folder {folder}" if root else f"the environment variable {MIRROR} is not set"
        raise LamellaError(f"{name} names a folder of the local mirror, but {said}.")
    return load_file(name, str(found), seed=seed)
