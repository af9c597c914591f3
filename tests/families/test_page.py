"""docs/what-runs-where.md is what the kept rows say, and they say enough."""

import json

from tests.families.checks import CHECKS, METHODS
from tests.families.page import EXPERTS, KEPT, PAGE, page

ROWS = json.loads(KEPT.read_text())
FAMILIES = ROWS["families"]


def said(family: str, method: str) -> list[str]:
    return [FAMILIES[family][method][check]["said"] for check in CHECKS]


def test_the_page_is_what_the_rows_say() -> None:
    assert PAGE.read_text() == page(ROWS, json.loads(EXPERTS.read_text()))


def test_there_are_enough_families() -> None:
    assert len(FAMILIES) >= 60
    assert all(
        answer["reason"]
        for answers in FAMILIES.values()
        for of in answers.values()
        for answer in of.values()
        if answer["said"] != "yes"
    )


def test_no_answer_is_a_fault() -> None:
    assert not [(name, method) for name in FAMILIES for method in METHODS if "fault" in said(name, method)]


def test_mola_works_wherever_lora_does() -> None:
    pairs = [(name, check) for name in FAMILIES for check in CHECKS if FAMILIES[name]["LoRA"][check]["said"] == "yes"]
    assert [pair for pair in pairs if FAMILIES[pair[0]]["MoLA"][pair[1]]["said"] != "yes"] == []


def test_molex_and_mole_work_in_forty_families() -> None:
    for method in ("MoLEx", "MOLE"):
        assert sum({"no", "fault"}.isdisjoint(said(name, method)) for name in FAMILIES) >= 40
