"""Every mixture of experts of transformers is read, or refused by name; one of each kind by default."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.families.experts import CHECKS, FAMILIES, examine, folder
from tests.families.page import EXPERTS, EXPERTS_ROWS
from tests.families.test_families import _digest, in_time

BY_NAME = {family.name: family for family in FAMILIES}
# Each has a file of its own, or keeps router and experts in the block itself.
KINDS: dict[str, set[str]] = {
    "dbrx": set(),
    "deepseek_v4": {"routed", "masked"},
    "gemma4_text": set(),
    "llama4_text": set(),
    "longcat_flash": set(),
    "zaya": {"routed"},
}


@pytest.mark.parametrize("name", KINDS)
def test_one_family_of_each_kind(name: str) -> None:
    answers = examine(BY_NAME[name])["answers"]
    assert {check: answer for check, answer in answers.items() if answer["said"] == "fault"} == {}
    assert {check for check, answer in answers.items() if answer["said"] == "no"} == KINDS[name]


@pytest.mark.parametrize("name", ["doge", "jetmoe", "nllb-moe"])
def test_what_is_not_read_is_refused_by_name(name: str) -> None:
    assert "that lamella does not read: " in examine(BY_NAME[name])["refused"]


@pytest.mark.heavy
@pytest.mark.parametrize("name", BY_NAME)
def test_every_family(name: str) -> None:
    path, code = EXPERTS_ROWS / f"{name}.json", _digest()
    row = json.loads(path.read_text()) if path.exists() else {}
    if row.get("code") != code:
        row = {"code": code, "family": name, **in_time(name, lambda: examine(BY_NAME[name]))}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row, indent=1) + "\n")
    assert not [check for check, answer in row.get("answers", {}).items() if answer["said"] == "fault"]


@pytest.mark.heavy
def test_no_folder_of_transformers_is_left_out() -> None:
    models = Path(transformers.__file__).parent / "models"
    marked = {path.parent.name for path in models.glob("*/modeling_*.py") if "@use_experts" in path.read_text()}
    assert marked <= {folder(family) for family in FAMILIES}


def test_at_most_five_folders_are_not_read() -> None:
    rows: dict[str, Any] = json.loads(EXPERTS.read_text())["families"]
    assert rows.keys() == BY_NAME.keys()
    assert sum("refused" in row for row in rows.values()) <= 5
    assert all(answer["said"] != "fault" for row in rows.values() for answer in row.get("answers", {}).values())
    assert all(set(row["answers"]) <= set(CHECKS) for row in rows.values() if "answers" in row)
