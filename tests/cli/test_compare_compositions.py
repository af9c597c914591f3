import json
import shutil

import pandas as pd
import pytest
from tests.lab.studies.conftest import cell_of, ran, recipe

from lamella.lab.studies.folder import StudyFolder

__all__ = ["ran", "recipe"]
TABLES = {"results.parquet", "examples.parquet", "interference.parquet", "masked.parquet"}


def without_mole(ran, path):
    """The study without its tables and without one of its cells."""
    _, cells, whole = ran
    folder, cell = StudyFolder(shutil.copytree(whole.path, path)), cell_of(cells, "MOLE")
    shutil.rmtree(folder.run(cell.key))
    for left in (*folder.path.glob(f"*/{cell.key}*"), *(folder.path / name for name in TABLES)):
        left.unlink(missing_ok=True)


def test_compare_runs_a_study_of_composition_and_says_what_it_could_not_run(lamella, ran, recipe, tmp_path):
    words = ["compare", recipe, "seeds=1", "-o", tmp_path / "out"]

    status, out, _ = lamella(*words, "--plan", "--json")
    assert status == 0
    assert json.loads(out)["cells"] == 9
    assert not (tmp_path / "out").exists()

    without_mole(ran, tmp_path / "out")
    status, out, err = lamella(*words, "--json")
    assert status == 0, err
    assert "8 done, 1 to run" in err
    printed = json.loads(out)
    assert printed["not_run"] == []
    assert {row["method"] for row in printed["cost"]} >= {"MOLE", "uniform", "joint LoRA"}
    assert {*TABLES, "study.yaml", "report.html"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "kl from own LoRA" in set(pd.read_parquet(tmp_path / "out" / "results.parquet")["metric"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "sign conflict" in page
    assert any(note.startswith("The doctor did not examine") and "uniform" in note for note in printed["notes"])

    # a method that does not train has no optimizer that could refuse a rate
    status, out, err = lamella(*words, "methods.uniform.router_lr=1", "methods.X-LoRA.router_lr=1")
    assert (status, out) == (1, "")
    assert "7 done, 2 to run" in err
    assert "Not run: 1 cell(s), the first: X-LoRA" in err


@pytest.mark.heavy  # minutes: each way by itself is tested on tiny models
@pytest.mark.real
def test_all_ways_to_compose_three_kinds_of_texts_in_miniature(lamella, tmp_path):
    small = ["seeds=1", "rows=24", "test_rows=8", "run.max_length=24", "lora.limit={train: 32, validation: 8, test: 8}"]
    small += ["head.limit={train: 64, validation: 8, test: 8}", "methods.LoRAHub.method.evaluations=4"]
    texts = ["sources={amazon: amazon, tweets: tweets, editorials: editorials}", "held_out={movies: movies-neutral}"]

    status, out, err = lamella(
        "compare", "studies/recipes/mole-domains.yaml", *texts, *small, "-o", tmp_path / "out", "--json"
    )

    assert status == 0, err
    printed = json.loads(out)
    assert printed["not_run"] == []
    rows = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert set(rows["task"]) == {"amazon", "tweets", "editorials", "movies", "mixture"}
    assert rows["method"].nunique() == 16 + 5
    assert (rows["status"] == "done").all()
    interference = pd.read_parquet(tmp_path / "out" / "interference.parquet")
    assert len(interference) == 3
    assert interference["sign_conflict"].between(0.2, 0.8).all()
