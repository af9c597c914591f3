"""`lamella evaluate --noise` from the command line."""

import json

import pandas as pd
import pytest


@pytest.fixture
def runs(mola_run, lora_runs):
    return mola_run, lora_runs / "first"


def test_scores_table_and_page_of_two_runs(lamella, runs, tmp_path):
    out = tmp_path / "new" / "noise"
    status, said, err = lamella(
        "evaluate", *runs, "--noise", "embedding", "--sigma", "0.5,4", "--seeds", "2", "-o", out
    )

    assert status == 0
    assert "lora minus mola: accuracy" in said
    assert "2 noise seed(s) were drawn; the protocol asks for at least 5" in said
    assert "Gaussian noise on embeddings" in err
    assert err.count("mola") >= 3  # a row per strength
    assert sorted(path.name for path in out.iterdir()) == ["differences.parquet", "report.html", "robustness.parquet"]
    assert len(pd.read_parquet(out / "robustness.parquet")) == 2 * 3 * 2 * 3
    page = (out / "report.html").read_text()
    assert "Robustness" in page
    assert "sigma 4" in page
    assert "real, non-special tokens" in page


@pytest.mark.parametrize("noise", ["tokens", "pgd"])
def test_json_and_nothing_else(lamella, runs, noise):
    words = ["--noise", noise, "--sigma", "0.2", "--seeds", "1", "--split", "validation", "--json"]
    status, said, _ = lamella("evaluate", runs[0], *words)

    assert status == 0
    printed = json.loads(said)
    assert (printed["noise"], printed["split"], printed["rows"]) == (noise, "validation", 16)
    assert {row["strength"] for row in printed["scores"]} == {0.0, 0.2}
    assert printed["differences"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--noise", "gauss"], "Choose one of embedding, tokens, pgd"),
        (["--noise", "embedding", "--sigma", "-0.1"], "sigma=-0.1 is not a strength"),
        (["--noise", "embedding", "--sigma", "much"], "'much' is not a list of strengths"),
        (["--sigma", "0.1"], "belong to an evaluation under noise"),
        (["--seeds", "3"], "belong to an evaluation under noise"),
        (["--noise", "tokens", "--split", "dev"], "no split 'dev'"),
    ],
)
def test_bad_input_is_status_2_and_writes_nothing(lamella, runs, tmp_path, words, message):
    status, said, err = lamella("evaluate", runs[0], *words, "-o", tmp_path / "out")

    assert (status, said) == (2, "")
    assert message in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_several_runs_need_a_noise(lamella, runs):
    status, _, err = lamella("evaluate", *runs)

    assert status == 2
    assert "--noise" in err


def test_a_run_is_not_overwritten_by_a_page_of_noise(lamella, runs):
    before = (runs[0] / "metrics.json").read_bytes()
    status, _, err = lamella("evaluate", runs[0], "--noise", "tokens", "-o", runs[0])

    assert status == 2
    assert "holds a run" in err
    assert (runs[0] / "metrics.json").read_bytes() == before
    assert not (runs[0] / "robustness.parquet").exists()
