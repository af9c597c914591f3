"""The ranges of pyproject.toml are what the kept run of `make compat` passed with, and the page shows that run."""

import json

import pytest
from packaging.version import Version
from tests.compat import record
from tests.compat.__main__ import outcome
from tests.compat.record import ENVIRONMENTS, KEPT, PAGE, floor_of, requirements, table

ROWS = json.loads(KEPT.read_text())
ENDED = [wanted for wanted in requirements() if "<" in str(wanted.specifier)]


def test_every_range_passed_from_one_end_to_the_other():
    ran = {row["name"]: row for row in ROWS}
    assert all(ran[name]["failed"] == {} and ran[name]["passed"] > 1500 for name in ENVIRONMENTS)
    assert {wanted.name for wanted in ENDED} == {"torch", "transformers", "peft", "accelerate", "diffusers"}
    for wanted in requirements():
        assert floor_of(wanted).specifier.contains(Version(ran["lowest"]["versions"][wanted.name]).public)
    for wanted in ENDED:
        newest = Version(ran["newest"]["versions"][wanted.name])
        assert wanted.specifier.contains(newest)
        assert not wanted.specifier.contains(f"{newest.major}.{newest.minor + 1}.0")


def test_the_page_shows_the_kept_run():
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(f"<!-- {KEPT.name} -->\n")[2].partition("<!-- end -->")[0] == table(ROWS)


def test_an_environment_takes_the_place_of_its_earlier_run(tmp_path, monkeypatch):
    page, kept = tmp_path / "page.md", tmp_path / "compat.json"
    monkeypatch.setattr(record, "PAGE", page)
    monkeypatch.setattr(record, "KEPT", kept)
    page.write_text("before\n<!-- compat.json -->\nold\n<!-- end -->\nafter\n")
    versions = {wanted.name: "9" for wanted in requirements()}
    row = {"name": "lowest", "python": "3.11.7", "versions": versions, "passed": 7, "failed": {}}
    record.keep(row | {"passed": 5})
    record.keep(row)
    record.keep(row | {"name": "lowest, peft==0.1", "failed": {"test_a": "ValueError: unknown", "test_b": ""}})
    assert [one["passed"] for one in json.loads(kept.read_text())] == [7, 7]
    before, shown, after = page.read_text().partition("| tests | | 7 passed |\n")
    assert before.startswith("before\n<!-- compat.json -->\n| | range | lowest |\n")
    assert (
        "Tried beside them: lowest, peft==0.1, 7 passed, 2 failed: ValueError: unknown\n<!-- end -->\nafter\n" in after
    )
    assert shown


def test_what_failed_is_read_by_name(tmp_path):
    said = tmp_path / "said.xml"
    said.write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="test_one"/>'
        '<testcase classname="tests.a" name="test_two"><failure message="ValueError: no&#10;more"/></testcase>'
        '<testcase classname="tests.b" name="test_three"><error message="ImportError: x">...</error></testcase>'
        '<testcase classname="tests.b" name="test_four"><skipped/></testcase></testsuite></testsuites>'
    )
    assert outcome(said) == {
        "passed": 1,
        "failed": {"tests.a::test_two": "ValueError: no", "tests.b::test_three": "ImportError: x"},
    }


@pytest.mark.parametrize(("line", "floor"), [("torch", "==2.10"), ("safetensors", "==0.8"), ("diffusers", "==0.42")])
def test_the_lowest_version_is_that_of_the_range(line, floor):
    (wanted,) = (one for one in requirements() if one.name == line)
    assert str(floor_of(wanted)) == f"{line}{floor}"
