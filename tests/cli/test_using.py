"""`export`, `evaluate` and `trace` from the command line."""

import json

import pandas as pd
import pytest


def test_export_prints_the_error_it_measured(lamella, mola_run, tmp_path):
    status, out, _ = lamella("export", mola_run, "--collapse", "--rows", "48", "-o", tmp_path / "lora", "--json")

    assert status == 0
    assert json.loads(out)["error"] == json.loads((tmp_path / "lora" / "error.json").read_text())["error"]
    status, out, _ = lamella("export", mola_run, "--collapse", "--rank", "1", "--rows", "16", "-o", tmp_path / "narrow")
    assert status == 0
    assert "% of the mixture's effect is lost, measured on the rows that were fitted" in out


def test_export_names_the_experts(lamella, mola_run, tmp_path):
    status, out, _ = lamella("export", mola_run, "--experts", "-o", tmp_path / "experts")

    assert status == 0
    assert out.split() == [str(tmp_path / "experts" / f"expert_{e}") for e in range(3)]


@pytest.mark.parametrize("words", [[], ["--experts", "--collapse"], ["--experts", "--rank", "2"]])
def test_export_has_to_be_told_what(lamella, mola_run, tmp_path, words):
    status, out, err = lamella("export", mola_run, *words, "-o", tmp_path / "out")

    assert status == 2
    assert "--collapse" in err
    assert out == ""


def test_evaluate_repeats_the_score_of_the_run(lamella, mola_run, questions, tmp_path):
    metrics = json.loads((mola_run / "metrics.json").read_text())
    examples = tmp_path / "new" / "examples.parquet"
    status, out, _ = lamella("evaluate", mola_run, "--task", questions, "-o", examples, "--json")

    assert status == 0
    assert json.loads(out)["metrics"] == metrics["test"]
    saved = pd.read_parquet(mola_run / "predictions.parquet").query("split == 'test'").reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet(examples), saved)
    assert [path.name for path in examples.parent.iterdir()] == [examples.name]


def test_evaluate_tells_people_the_metric(lamella, mola_run):
    status, out, _ = lamella("evaluate", mola_run, "--split", "validation")

    assert status == 0
    assert "16 validation rows" in out
    assert "(the metric of the task)" in out


def test_trace_leaves_the_routing_and_a_page(lamella, mola_run, questions, tmp_path):
    status, out, _ = lamella("trace", mola_run, "--task", questions, "--rows", "10", "-o", tmp_path / "trace", "--json")

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


def test_trace_tells_people_where_it_is(lamella, mola_run, tmp_path):
    status, out, _ = lamella("trace", mola_run, "--rows", "2", "-o", tmp_path / "trace")

    assert status == 0
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'trace' / 'report.html'}"


@pytest.mark.parametrize("command", ["export", "evaluate", "trace"])
def test_help_has_an_example(lamella, command):
    status, out, _ = lamella(command, "--help")

    assert status == 0
    assert f"Example: lamella {command}" in " ".join(out.split())
