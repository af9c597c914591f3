import re
import shutil
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.__main__ import DOCS, main
from benchmarks.record import Record
from benchmarks.tables import render, update_page
from lamella.errors import LamellaError

RECORDS = sorted(DOCS.glob("results/bench-*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_the_page_shows_the_kept_records(path):
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    begin, end = f"<!-- {path.name} -->\n", "<!-- end -->"
    assert page.count(begin) == 1
    assert page.partition(begin)[2].partition(end)[0] == render(Record.read(path))


@pytest.mark.parametrize("bench", ["mola", "mole", "molex", "similarity", "serving"])
def test_there_is_a_record_of_each_method(bench):
    assert (DOCS / "results" / f"bench-{bench}-cpu.json").is_file()


def test_a_page_is_written_from_its_records(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench-forms-cpu.json -->\nold\n<!-- end -->\nafter\n")
    (record,) = (path for path in RECORDS if "forms" in path.name)
    update_page(page, [record])
    update_page(page, [record])  # a second time changes nothing
    assert page.read_text() == f"before\n<!-- {record.name} -->\n{render(Record.read(record))}<!-- end -->\nafter\n"


def test_a_record_survives_its_file(record, tmp_path):
    path = tmp_path / "deep" / "bench.json"
    record("mola").write(path)
    assert Record.read(path) == record("mola")
    assert [file.name for file in path.parent.iterdir()] == ["bench.json"]


def test_a_file_that_is_not_a_record_is_refused(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text('{"bench": "mola"}')
    with pytest.raises(LamellaError, match=r"bench\.json is not the record"):
        Record.read(path)
    with pytest.raises(LamellaError, match="is not the record"):
        Record.read(tmp_path / "absent.json")


def test_a_target_is_met_or_missed(record):
    faster = record("molex").model_copy(deep=True)
    for ratio in faster.cases[0].ratios:
        ratio.median = 1.0
    assert "missed" not in render(faster)
    for ratio in faster.cases[0].ratios:
        ratio.median = 3.0
    assert render(faster).count("**missed**") == 7


def test_the_command_writes_a_record_and_prints_its_tables(tmp_path, capsys):
    assert main(["forms", "widths=[8]", "--quick", "-o", str(tmp_path)]) == 0
    assert "| d=8, E=2 |" in capsys.readouterr().out
    assert Record.read(tmp_path / "bench-forms-cpu.json").settings["widths"] == [8]


def test_the_command_writes_the_page(tmp_path, monkeypatch):
    shutil.copytree(DOCS / "results", tmp_path / "results", ignore=shutil.ignore_patterns("studies", "similarity"))
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    (tmp_path / "performance.md").write_text(page.replace("| mola |", "| another |"), encoding="utf-8")
    monkeypatch.setattr(command, "DOCS", tmp_path)
    assert main(["--page"]) == 0
    assert (tmp_path / "performance.md").read_text(encoding="utf-8") == page


def test_the_command_refuses_before_it_starts(tmp_path, capsys):
    assert main(["molex", "tokens=256", "-o", str(tmp_path)]) == 2
    assert "tokens=256" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["lora"])
    assert "no benchmark 'lora'" in capsys.readouterr().err


def test_nothing_names_the_host_or_its_folders(record):
    text = record("mola").model_dump_json()
    assert not re.search(rf"{re.escape(str(Path.cwd()))}|{re.escape(str(Path.home()))}", text)
