"""Files and folders written atomically (complete or not at all); files read whole or refused by name; digests."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lamella.errors import UnreadableError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

UNFINISHED = ".writing-"  # how the names begin of what a killed process left half-written


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to; it takes the place of ``path`` if the block succeeds.

    It lies in the same folder, so that what names other files relative to its own place stays right. That folder is
    made where there is none.

    Raises:
        OSError: it could not be written (a full disk, say); it names ``path``, and what was there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        yield unfinished
        if path.is_dir() and unfinished.is_dir():
            shutil.rmtree(path)
        unfinished.replace(path)
    except SafetensorError as error:  # its word for a full disk
        raise OSError(errno.EIO, str(error), str(path)) from error
    except OSError as error:
        # an error without a file comes from a library that had just this one open
        if error.filename is not None and unfinished.name not in str(error.filename):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone holds a file or folder; the kernel gives the lock back however the process ends.

    A file is made where there is neither. Where the system has no such locks, as Windows has none, it is always so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ModuleNotFoundError:
        yield True
        return
    # NFS locks a file only for who may write to it.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        mine = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        os.close(descriptor)


def sha256_of(*files: Path, after: bytes = b"") -> str:
    """The SHA-256 of some bytes and then the files' one after another, in hexadecimal, read piece by piece."""
    digest = hashlib.sha256(after)
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UnreadableError: it cannot be read, is not JSON, gives a key twice, or holds something else than an object.
    """
    return _mapping(path, "JSON", lambda text: json.loads(text, object_pairs_hook=_object))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, without tags of Python's.

    Raises:
        UnreadableError: it cannot be read, is not YAML, gives a key twice, or holds something else than a mapping.
    """
    return _mapping(path, "YAML", _parse_yaml)


def read_table(path: Path, *columns: str) -> pd.DataFrame:
    """The table in a Parquet file.

    Args:
        path: of the file.
        columns: that it must have; others are read too.

    Raises:
        UnreadableError: it cannot be read, is not Parquet, or lacks a column.
    """
    import pandas as pd

    with _reading(path, "Parquet"):
        table = pd.read_parquet(path)
    if missing := [column for column in columns if column not in table.columns]:
        raise UnreadableError(f"{path} has no column '{missing[0]}', so it is not what was written there. {_WAY_OUT}")
    return table


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name, on the CPU.

    Raises:
        UnreadableError: it cannot be read or is not safetensors.
    """
    from safetensors.torch import load_file

    with _reading(path, "safetensors"):
        tensors: dict[str, Tensor] = load_file(path)
    return tensors


_WAY_OUT = "Restore it from a copy, or make it again."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would take the last value of a key that is there twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is given twice")
        found[key] = value
    return found


def _parse_yaml(text: str) -> Any:
    """What `yaml.safe_load` makes of a text in which no key is there twice, of which it would take the last value."""
    import yaml

    try:
        if twice := _given_twice(yaml.compose(text, yaml.SafeLoader)):
            raise ValueError(twice)
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem}{where}") from error


def _given_twice(tree: Any) -> str | None:
    """Which key a mapping in a tree of YAML's nodes has twice, in words; None where none does."""
    nodes, seen = [tree], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):  # an alias is the same node
            continue
        seen.add(id(node))
        keys = set()
        for entry in node.value:  # of a mapping pairs, of a sequence nodes
            key, value = entry if isinstance(entry, tuple) else (None, entry)
            nodes.append(value)
            if key is not None:
                if (name := (key.tag, str(key.value))) in keys:
                    return f"{key.value!r} is given twice, again in line {key.start_mark.line + 1}"
                keys.add(name)
    return None


def _mapping(path: Path, form: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    with _reading(path, form):
        content = parse(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UnreadableError(f"{path} holds {type(content).__name__} and no 'key: value' pairs. {_WAY_OUT}")
    return content


@contextlib.contextmanager
def _reading(path: Path, form: str) -> Iterator[None]:
    """Whatever a library raises over damaged bytes becomes one sentence that names the file."""
    if path.is_dir():  # pandas would take it for a table in parts
        raise UnreadableError(f"{path} cannot be read: it is a folder where a file should be. {_WAY_OUT}")
    try:
        yield
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise UnreadableError(f"{path} cannot be read: {reason}. {_WAY_OUT}") from error
    except Exception as error:
        reason = _first_line(error)
        raise UnreadableError(f"{path} is not valid {form}: {reason}. {_WAY_OUT}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")
