"""Where published rows lie: a local mirror folder, or the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lamella.errors import LamellaError
from lamella.files import sha256_of
from lamella.lab.data.files import stated_source
from lamella.texts.files import read_rows
from lamella.texts.rows import Row

MIRROR = "LAMELLA_DATA"


@dataclass(frozen=True)
class Raw:
    """Published rows as they were read.

    Attributes:
        splits: rows of each split, with the columns of the source.
        source: a sentence for the model card.
        licence: as the source states it; empty where it states none.
        names: label names that the source states, in the order of its integer labels.
        notes: what is unusual about the splits.
    """

    splits: dict[str, list[Row]]
    source: str
    licence: str = ""
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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
            f"The environment variable {MIRROR} is {root!r}, which is no folder. Correct it or unset it."
        )
    path = Path(root) / folder
    return path if path.is_dir() else None


def from_mirror(folder: Path, splits: Mapping[str, tuple[str, ...]]) -> Raw:
    """Rows of a mirror folder: `FILE.jsonl.gz` for each file of a split, described by its `SOURCE.md`."""
    paths = {file: folder / f"{file}.jsonl.gz" for files in splits.values() for file in files}
    read = {file: read_rows(path) for file, path in paths.items()}
    digests = ", ".join(f"{path.name} sha256 {sha256_of(path)[:16]}" for path in paths.values())
    stated = stated_source(folder)
    origin = " at commit ".join(stated[key] for key in ("repository", "commit") if key in stated) or "a local mirror"
    stand_in = [file for file in splits.get("train", ()) if not file.startswith("train")]
    return Raw(
        splits={split: [row for file in files for row in read[file]] for split, files in splits.items()},
        source=f"{origin} ({digests})",
        licence=stated.get("license", ""),
        notes=tuple(f"the mirror has no train file: the published {file} rows are trained on" for file in stand_in),
    )


def from_hub(repository: str, config: str | None, splits: Mapping[str, str] | None = None) -> Raw:
    """Rows of a dataset on the hub.

    Args:
        repository: its id.
        config: its configuration, where it has several.
        splits: the hub's split for each of ours; None takes train, validation and test as they are called.

    Raises:
        LamellaError: the hub cannot be reached, or has no such dataset or split.
    """
    import datasets

    called = f"{repository} ({config})" if config else repository
    try:
        loaded = datasets.load_dataset(repository, config)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().split("\n")[0].rstrip(".")
        raise LamellaError(
            f"{called} could not be loaded from the Hugging Face hub: {first_line}. Check the name and the network, "
            f"or set the environment variable {MIRROR} to a local mirror folder, or write the rows to a file and use "
            "file:PATH."
        ) from error
    wanted = splits or {split: split for split in ("train", "validation", "test") if split in loaded}
    missing = set(wanted.values()) - set(loaded)
    if missing or "train" not in wanted or len(wanted) < 2:
        raise LamellaError(
            f"{called} has the splits {', '.join(loaded)}; a train split and a validation or test split are needed. "
            "Write the rows to a file and use file:PATH."
        )
    names = getattr(loaded[wanted["train"]].features.get("label"), "names", None)
    return Raw(
        splits={ours: list(loaded[theirs]) for ours, theirs in wanted.items()},
        source=f"{called} on the Hugging Face hub",
        names=tuple(names or ()),
    )
