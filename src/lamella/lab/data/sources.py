"""Where rows lie: in a demo asset, a folder of `LAMELLA_DATA`, files anywhere, or on the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.errors import LamellaError
from lamella.files import sha256_of
from lamella.lab.data.assets import ASSETS, fetch
from lamella.lab.data.entry import Hub, TaskEntry
from lamella.texts.files import read_csv, read_rows
from lamella.texts.rows import Row

MIRROR = "LAMELLA_DATA"


@dataclass(frozen=True)
class Raw:
    """Rows as they were read.

    Attributes:
        splits: rows of each split, with the columns of the source.
        origins: what an error calls the rows of each split.
        source: a sentence for the model card.
        licence: as the source states it; empty where it states none.
        names: label names that the source states, in the order of its integer labels.
        notes: what is unusual about the splits.
    """

    splits: Mapping[Any, list[Row]]
    origins: Mapping[Any, str]
    source: str
    licence: str = ""
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_source(name: str, entry: TaskEntry, beside: Path) -> Raw:
    """The rows that an entry names.

    Args:
        name: of the task, for errors.
        entry: says where the rows are.
        beside: the folder of the entry's file.

    Raises:
        LamellaError: the rows lie in none of the places that the entry names.
    """
    if entry.asset is not None:
        return _from_asset(name, entry)
    if entry.folder is not None:
        folder = mirror_folder(entry.folder)
        if folder is not None:
            return _from_files(entry, folder)
    elif entry.files:
        return _from_files(entry, beside)
    if entry.hub is not None:
        return from_hub(entry.hub)
    files = ", ".join(file for files in entry.files.values() for file in _listed(files))
    raise LamellaError(
        f"{name} has no copy on the hub that loads without running its code. Set the environment variable {MIRROR} to "
        f"a mirror that has the folder {entry.folder} with {files}, or write the rows to a file and use file:PATH."
    )


def mirror_folder(folder: str) -> Path | None:
    """A folder of the local mirror that the environment variable `LAMELLA_DATA` names; None where there is none.

    Raises:
        LamellaError: the variable names no folder.
    """
    root = os.environ.get(MIRROR)
    if not root:
        return None
    if not Path(root).is_dir():
        raise LamellaError(
            f"The environment variable {MIRROR} is {root!r}, which is not a folder. Correct it or unset it."
        )
    path = Path(root) / folder
    return path if path.is_dir() else None


def source_lines(folder: Path) -> dict[str, str]:
    """The `- key: value` lines of a folder's `SOURCE.md`."""
    path = folder / "SOURCE.md"
    if not path.is_file():
        return {}
    lines = (line[2:].partition(": ") for line in path.read_text("utf-8").splitlines() if line.startswith("- "))
    return {key: value.strip() for key, separator, value in lines if separator}


def from_hub(hub: Hub) -> Raw:
    """Rows of a dataset on the hub.

    Raises:
        LamellaError: the hub cannot be reached, or has no such dataset or split.
    """
    import datasets

    called = f"{hub.repository} ({hub.config})" if hub.config else hub.repository
    try:
        loaded = datasets.load_dataset(hub.repository, hub.config)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().split("\n")[0].rstrip(".")
        raise LamellaError(
            f"{called} could not be loaded from the Hugging Face hub: {first_line}. Check the name and the network, "
            f"or set the environment variable {MIRROR} to a local mirror folder, or write the rows to a file and use "
            "file:PATH."
        ) from error
    wanted: Mapping[Any, str] = hub.splits or {one: one for one in ("train", "validation", "test") if one in loaded}
    missing = set(wanted.values()) - set(loaded)
    if missing or "train" not in wanted or len(wanted) < 2:
        raise LamellaError(
            f"{called} has the splits {', '.join(loaded)}; a train split and a validation or test split are needed. "
            "Write the rows to a file and use file:PATH."
        )
    return Raw(
        splits={ours: list(loaded[theirs]) for ours, theirs in wanted.items()},
        origins={ours: f"{called}, {theirs} split" for ours, theirs in wanted.items()},
        source=f"{called} on the Hugging Face hub",
        names=tuple(getattr(loaded[wanted["train"]].features.get("label"), "names", None) or ()),
    )


def _from_asset(name: str, entry: TaskEntry) -> Raw:
    if entry.asset not in ASSETS:
        raise LamellaError(f"{name} names the asset {entry.asset!r}; known are {', '.join(ASSETS)}.")
    asset, folder = ASSETS[entry.asset], fetch(entry.asset)
    splits = {
        split: [row for path in _paths(folder, files) for row in _read(path, entry)]
        for split, files in entry.files.items()
    }
    origins = dict.fromkeys(splits, f"{name}, from {asset.source}")
    return Raw(splits, origins, f"{entry.about}, from {asset.source}", asset.licence)


def _from_files(entry: TaskEntry, folder: Path) -> Raw:
    """Rows of files, described by the `SOURCE.md` beside them."""
    paths = {split: _paths(folder, files) for split, files in entry.files.items()}
    splits = {split: [row for path in files for row in _read(path, entry)] for split, files in paths.items()}
    published = source_lines(folder)
    origin = " at commit ".join(published[key] for key in ("repository", "commit") if key in published) or "local files"
    digests = ", ".join(f"{path.name} sha256 {sha256_of(path)[:16]}" for files in paths.values() for path in files)
    about = f"{entry.about}, from " if entry.about else ""
    other = [] if entry.folder is None else [path.name.split(".")[0] for path in paths.get("train", [])]
    return Raw(
        splits,
        {split: " and ".join(path.name for path in files) for split, files in paths.items()},
        f"{about}{origin} ({digests})",
        published.get("license", ""),
        notes=tuple(
            f"the mirror has no train file: the published {stem} rows are trained on"
            for stem in other
            if not stem.startswith("train")
        ),
    )


def _listed(files: str | list[str]) -> list[str]:
    return [files] if isinstance(files, str) else files


def _paths(folder: Path, files: str | list[str]) -> list[Path]:
    """The files that match, in the order of their names; one that is missing is left for its reader to name."""
    return [path for file in _listed(files) for path in sorted(folder.glob(file)) or [folder / file]]


def _read(path: Path, entry: TaskEntry) -> list[Row]:
    """The rows of a file: as its suffix says, or a CSV of any name and packing, lines, or one JSON document."""
    if entry.format is None:
        return read_rows(path)
    if not path.is_file():
        raise LamellaError(f"There is no file {path}.")
    try:
        if entry.format == "csv":
            return read_csv(path)
        content = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")
        if entry.format == "json":
            return [{"file": path, "content": json.loads(content)}]
        return [{"line": line.removesuffix("\r")} for line in content.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise LamellaError(f"{path.name} cannot be read as {entry.format}: {error}.") from error
