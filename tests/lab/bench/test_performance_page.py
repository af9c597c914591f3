from pathlib import Path

import pytest

from lamella.lab.bench import render_table

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("record", sorted(DOCS.glob("results/bench-*.json")), ids=lambda path: path.name)
def test_the_page_shows_the_committed_records(record):
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    begin, end = f"<!-- {record.name} -->\n", "<!-- end -->"
    assert page.count(begin) == 1
    assert page.partition(begin)[2].partition(end)[0].strip() == render_table(record).strip()


@pytest.mark.parametrize("bench", ["mola", "mole", "molex", "similarity"])
def test_there_is_a_record_of_the_train_step(bench):
    assert (DOCS / "results" / f"bench-{bench}-cpu.json").is_file()
