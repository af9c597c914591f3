"""Rows of the pages of families: kept with the code that was asked, and asked again where that has changed."""

import hashlib
import json
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lamella

SECONDS = 240  # for one family; several times what the slowest one needs


class TakesTooLong(BaseException):
    """Past whatever catches errors of a family, to the test that asked."""


def kept_row(folder: Path, name: str, ask: Callable[[], dict[str, Any]], unused: Collection[str]) -> dict[str, Any]:
    """The row of a family: the one in the folder, or what it answers now; without the rooms that no answer uses."""
    path, code = folder / f"{name}.json", _digest(unused)
    row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if row.get("code") != code:
        row = {"code": code, "family": name, **_in_time(name, ask)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row, indent=1) + "\n")
    return row


def _in_time(name: str, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it answers.

    Raises:
        TakesTooLong: more than `SECONDS`.
    """

    def stop(*_: object) -> None:
        raise TakesTooLong(f"{name} took more than {SECONDS} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return ask()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def _digest(unused: Collection[str]) -> str:
    """Of the code whose answers the rows are: lamella's and the checks'."""
    library = Path(lamella.__file__).parent
    rooms = {library / room for room in unused}
    files = [path for path in sorted(library.rglob("*.py")) if rooms.isdisjoint(path.parents)]
    files += sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
