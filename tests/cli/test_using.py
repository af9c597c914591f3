"""`export`, `evaluate` and `trace` from the command line."""

import json

import pandas as pd
import pytest
from tests.cli.test_commands import lamella
from tests.lab.tiny_runs import tiny_settings

from lamella.lab.runs.run import train

__all__ = ["lamella"]
MOLA = {"name": "mola", "r": 2, "num_experts": [2, 3], "top_k": 2}


@pytest.fixture(scope="module")
def run(bert, questions, tmp_path_factory):
    return train(tiny_settings(bert, questions, MOLA), tmp_path_factory.mktemp("used") / "run").folder.path


def test_export_prints_the_error_it_measured(lamella, run, tmp_path):
    status, out, _ = lamella("export", run, "--collapse", "--rows", "48", "-o", tmp_path / "lora", "--json")

    assert status == 0
    assert json.loads(out)["error"] == json.loads((tmp_path / "lora" / "error.json").read_text())["error"]
    status, out, _ = lamella("export", run, "--collapse", "--rank", "1", "--rows", "16", "-o", tmp_path / "narrow")
    assert status == 0
    assert "% of the mixture's effect is lost, measured on the rows that were fitted" in out


def test_export_names_the_experts(lamella, run, tmp_path):
    status, out, _ = lamella("export", run, "--experts", "-o", tmp_path / "experts")

    assert status == 0
    assert out.split() == [str(tmp_path / "experts" / f"expert_{e}") for e in range(3)]


@pytest.mark.parametrize("words", [[], ["--experts", "--collapse"], ["--experts", "--rank", "2"]])
def test_export_has_to_be_told_what(lamella, run, tmp_path, words):
    status, out, err = lamella("export", run, *words, "-o", tmp_path / "out")

    assert status == 2
    assert "--collapse" in err
    assert out == ""


def test_evaluate_repeats_the_score_of_the_run(lamella, run, questions, tmp_path):
    metrics = json.loads((run / "metrics.json").read_text())
    examples = tmp_path / "new" / "examples.parquet"
    status, out, _ = lamella("evaluate", run, "--task", questions, "-o", examples, "--json")

    assert status == 0
    assert json.loads(out)["metrics"] == metrics["test"]
    kept = pd.read_parquet(run / "predictions.parquet").query("split == 'test'").reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet(examples), kept)
    assert [path.name for path in examples.parent.iterdir()] == [examples.name]


def test_evaluate_tells_people_the_metric(lamella, run):
    status, out, _ = lamella("evaluate", run, "--split", "validation")

    assert status == 0
    assert "16 validation rows" in out
    assert "(the metric of the task)" in out


def test_trace_leaves_the_routing_and_a_page(lamella, run, questions, tmp_path):
    status, out, _ = lamella("trace", run, "--task", questions, "--rows", "10", "-o", tmp_path / "trace", "--json")

    assert status == 0
    printed = json.loads(out)
    assert printed["rows"] == 10
    assert printed["entropy"] > 0
    frame = pd.read_parquet(tmp_path / "trace" / "trace.parquet")
    assert set(frame["layer"]) == {0, 1}
    page = (tmp_path / "trace" / "report.html").read_text()
    assert "row 8" in page
    assert "Redundancy" in page
    assert "The doctor has not examined" not in page


@pytest.mark.parametrize("command", ["export", "evaluate", "trace"])
def test_help_has_an_example(lamella, command):
    status, out, _ = lamella(command, "--help")

    assert status == 0
    assert f"Example: lamella {command}" in " ".join(out.split())
