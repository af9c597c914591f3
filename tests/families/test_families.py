"""Each answer of the matrix is yes, or no by name; one family per code path by default, all of them in `heavy`."""

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.families.catalogue import FAMILIES, PATHS
from tests.families.checks import CHECKS, METHODS, examine

import lamella

SECONDS = 240  # for one family; several times what the slowest one needs
ROWS = Path("runs/families")
BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize("name", PATHS)
def test_one_family_for_each_path(name: str) -> None:
    answers = examine(BY_NAME[name])
    assert not _faults(answers)
    assert not [(method, check) for method in METHODS[1:] for check in CHECKS if answers[method][check]["said"] == "no"]


@pytest.mark.parametrize(
    ("name", "method", "checks"),
    [
        ("canine", "MOLE", ("padding",)),  # words pooled from characters
        ("longformer", "MoLEx", ("padding",)),  # padded by the model itself
        ("git", "MOLE", ("padding",)),  # an image before the words
        ("mistral3", "MoLEx", ("batch-mates",)),  # all images in one row
        ("recurrent_gemma", "MoLEx", ("generation",)),  # states kept in the blocks
    ],
)
def test_blocks_that_are_given_other_tokens_or_keep_states(name: str, method: str, checks: tuple[str, ...]) -> None:
    answers = examine(BY_NAME[name], (method,), checks)
    assert {answer["said"] for of_method in answers.values() for answer in of_method.values()} == {"yes"}, answers


@pytest.mark.heavy
@pytest.mark.parametrize("name", BY_NAME)
def test_every_family(name: str) -> None:
    """Keeps the family's row, and asks again only where the code has changed since."""
    path, code = ROWS / f"{name}.json", _digest()
    row = json.loads(path.read_text()) if path.exists() else {}
    if row.get("code") != code:
        row = {
            "code": code,
            "family": name,
            "head": BY_NAME[name].head,
            "answers": in_time(name, lambda: examine(BY_NAME[name])),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row, indent=1) + "\n")
    assert not _faults(row["answers"])


def in_time(name: str, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it answers.

    Raises:
        TimeoutError: it takes too long.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"{name} took more than {SECONDS} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return ask()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def _faults(answers: dict[str, Any]) -> list[str]:
    return [
        f"{method} {check}: {answer['reason']}"
        for method, of_method in answers.items()
        for check, answer in of_method.items()
        if answer["said"] == "fault"
    ]


def _digest() -> str:
    """Of the code whose answers the rows are: lamella's and the checks'."""
    folders = (Path(lamella.__file__).parent, Path(__file__).parent)
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
