import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from tests.lab.tiny_studies import write_study

from lamella.progress import listening


@pytest.fixture
def recipe(bert, questions, tmp_path):
    return write_study(tmp_path / "study.yaml", bert, questions, max_steps=2)


def test_compare_leaves_table_and_report_and_says_what_was_not_run(lamella, recipe, tmp_path):
    words = ["compare", recipe, "seeds=1", "-o", tmp_path / "out"]

    status, out, _ = lamella(*words, "--plan", "--json")
    assert status == 0
    assert json.loads(out)["cells"] == 4
    assert not (tmp_path / "out").exists()

    status, out, _ = lamella(*words, "--json")
    assert status == 0
    printed = json.loads(out)
    assert printed["not_run"] == []
    assert [row["method"] for row in printed["results"][2:]] == ["MoLA", "LoRA", "again", "head"]
    assert len(pd.read_parquet(tmp_path / "out" / "results.parquet")) == 4 * 2 * 3
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not significantly different" in page
    assert "floor (majority)" in page
    for heading in ("Training", "Tokens", "Redundancy"):
        assert f">{heading}</h2>" in page
    costs = {row["method"]: row for row in printed["costs"]}
    assert costs["LoRA"]["step time"] == 1
    assert costs["MoLA"]["step time"] > 0
    assert costs["head"]["kept MB"] < costs["LoRA"]["kept MB"]
    assert all(row["latency ms, batch 32"] > 0 for row in costs.values())
    with listening(lambda work: pytest.fail(str(work)) if work.name.startswith("measuring") else None):
        status, out, err = lamella(*words)
    assert (status, out) == (0, "")
    assert "3 done, 0 to run" in err
    assert "again" in err

    status, _, err = lamella(*words, "methods.head.router_lr=1")
    assert status == 1
    said = " ".join(err.split())
    assert "2 done, 1 to run" in said
    assert "Not run: 1 cell(s), the first: head" in said
    assert "no trainable router" in said
    assert "not run" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["seeds=1"], "Name the recipe"), (["trec-mola"], "lamella train"), (["shapes"], "demo-compose")],
)
def test_what_is_no_study_is_status_2(lamella, words, message):
    status, _, err = lamella("compare", *words)

    assert status == 2
    assert message in " ".join(err.split())


def test_the_folder_of_a_first_edition_study_goes_on(lamella, tmp_path, monkeypatch):
    for name in ("base", "rows", "study"):
        shutil.copytree(Path(__file__).parents[1] / "first_edition" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)

    status, _, err = lamella("compare", "study")

    assert status == 0, err
    said = " ".join(err.split())
    assert "that an earlier edition of lamella finished are recognised by their settings" in said
    assert "3 cells, 3 done, 0 to run" in said
    assert (tmp_path / "study" / "keys.json").is_file()
    assert "Redundancy</h2>" in (tmp_path / "study" / "report.html").read_text()
