"""`lamella similarity screen`: which measures are taken."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from tests import tiny_moe
from tests.cli.test_similarity import run

from lamella.cli.similarity import subject
from lamella.similarity.activations import capture
from lamella.similarity.screening import MEASURES, table
from lamella.similarity.study import StudyFolder


@pytest.fixture
def study(tmp_path, monkeypatch):
    model = tiny_moe.build("qwen2_moe")
    captured = capture(model, [tiny_moe.inputs(4, 12, seed=seed) for seed in range(4)], tmp_path / "capture", 16)
    opened = SimpleNamespace(folder=StudyFolder(tmp_path), model=model, capture=captured)
    monkeypatch.setattr(subject, "open_study", lambda path: opened)
    return tmp_path


def screened(monkeypatch, capsys, study, *words):
    """The measures that the table has, what was told as JSON, and what was said beside."""
    assert run(monkeypatch, "screen", study, "--json", *words) == 0
    written, said = pd.read_parquet(study / "screen.parquet"), capsys.readouterr()
    told = json.loads(said.out)
    assert told["pairs"] == len(written)
    return [name for name in MEASURES if written[name].notna().any()], told["medians"], said.err


def test_all_measures_of_few_pairs_and_the_quick_ones_of_many(study, monkeypatch, capsys):
    found, medians, said = screened(monkeypatch, capsys, study)
    assert found == list(MEASURES) == list(medians)
    assert "left out" not in said
    monkeypatch.setattr(table, "MOST_PAIRS", 10)
    found, medians, said = screened(monkeypatch, capsys, study)
    assert found == ["floor", "cka_distance"]
    assert "predicted, weight_distance, coactivation left out" in " ".join(said.split())


def test_measures_can_be_named(study, monkeypatch, capsys):
    found, medians, said = screened(monkeypatch, capsys, study, "--measure", "weight_distance")
    assert found == ["weight_distance"] == list(medians)
    assert "left out" not in said
    assert run(monkeypatch, "screen", study, "--measure", "angle") == 2
    assert "'angle' is not a measure" in " ".join(capsys.readouterr().err.split())
