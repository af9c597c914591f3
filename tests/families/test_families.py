"""Each answer of the matrix is yes, or no by name; one family per code path by default, all of them in `heavy`."""

from typing import Any

import pytest
from tests.families.catalogue import FAMILIES, PATHS
from tests.families.checks import CHECKS, METHODS, examine
from tests.families.page import ROWS
from tests.families.rows import kept_row

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize("name", PATHS)
def test_one_family_for_each_path(name: str) -> None:
    answers = examine(BY_NAME[name], METHODS[1:])
    assert not _faults(answers)
    assert not [(method, check) for method in METHODS[1:] for check in CHECKS if answers[method][check]["said"] == "no"]


@pytest.mark.parametrize(
    ("name", "method", "checks"),
    [
        ("canine", "MOLE", ("padding",)),  # words pooled from characters
        ("longformer", "MoLEx", ("padding",)),  # padded by the model itself
        ("git", "MOLE", ("padding",)),  # an image before the words
        ("mistral3", "MoLEx", ("batch-mates",)),  # all images in one row
        ("qwen3_vl", "MoLEx", ("generation",)),  # a mask that the model makes itself, of an image's tokens
        ("recurrent_gemma", "MoLEx", ("generation",)),  # states kept in the blocks
    ],
)
def test_blocks_that_are_given_other_tokens_or_keep_states(name: str, method: str, checks: tuple[str, ...]) -> None:
    answers = examine(BY_NAME[name], (method,), checks)
    assert {answer["said"] for of_method in answers.values() for answer in of_method.values()} == {"yes"}, answers


@pytest.mark.heavy
@pytest.mark.parametrize("name", BY_NAME)
def test_every_family(name: str) -> None:
    def ask() -> dict[str, Any]:
        return {"head": BY_NAME[name].head, "answers": examine(BY_NAME[name])}

    row = kept_row(ROWS, name, ask, unused=("cli", "lab", "diffusion", "similarity"))
    assert not _faults(row["answers"])


def _faults(answers: dict[str, Any]) -> list[str]:
    return [
        f"{method} {check}: {answer['reason']}"
        for method, of_method in answers.items()
        for check, answer in of_method.items()
        if answer["said"] == "fault"
    ]
