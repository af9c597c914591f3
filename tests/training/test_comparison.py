import json

import numpy as np
import pandas as pd
import pytest
from tests.training.tiny_runs import tiny_settings

from lamella.errors import LamellaError
from lamella.training.comparison import FLOOR, compare, demo

MOLA = {"name": "mola", "r": 2, "num_experts": 2}


@pytest.fixture
def arms(bert, questions):
    return {
        "MoLA": tiny_settings(bert, questions, MOLA),
        "LoRA": tiny_settings(bert, questions, {"name": "lora", "match": MOLA}),
    }


def test_a_comparison_says_what_its_runs_say(arms, tmp_path):
    started = []
    comparison = compare(arms, [0, 1], tmp_path, starting=started.append)

    assert started == ["MoLA, seed 0", "LoRA, seed 0", "MoLA, seed 1", "LoRA, seed 1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora-seed0", "lora-seed1", "mola-seed0", "mola-seed1"]
    rows = comparison.results.set_index("method")
    for name in arms:
        scores = [
            json.loads((tmp_path / f"{name.lower()}-seed{seed}" / "metrics.json").read_text())["test"]["accuracy"]
            for seed in (0, 1)
        ]
        assert rows.loc[name, ["seed 0", "seed 1"]].tolist() == scores
        assert rows.loc[name, "mean"] == np.mean(scores)
        low, high = rows.loc[name, "interval"]
        assert low <= np.mean(scores) <= high
    assert rows.loc["MoLA", "mean"] - rows.loc["LoRA", "mean"] == pytest.approx(comparison.difference.difference)
    assert rows.loc[FLOOR, "mean"] == 1.0  # the first word gives the label away
    assert set(comparison.routing["num_experts"]) == {2}
    assert comparison.cost["method"].tolist() == ["MoLA", "LoRA"]
    assert any("rank" in note for note in comparison.notes)
    assert f"{comparison.difference}" in comparison.summary
    assert json.loads(json.dumps(comparison.as_dict()))["runs"]["LoRA"][1]["seed"] == 1


def test_finished_runs_are_taken_as_they_are(arms, tmp_path, monkeypatch):
    first = compare(arms, [0], tmp_path)

    def untouched(*args, **kwargs):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr("lamella.training.comparison.train", untouched)
    second = compare(arms, [0], tmp_path)

    pd.testing.assert_frame_equal(first.results, second.results)
    with pytest.raises(AssertionError, match="trained again"):
        compare(arms, [0], tmp_path, force=True)


def test_a_finished_run_of_other_settings_is_not_passed_off(arms, tmp_path):
    compare(arms, [0], tmp_path)
    others = {name: settings.model_copy(update={"lr": 1e-5}) for name, settings in arms.items()}

    with pytest.raises(LamellaError, match=r"lr=0\.005.*lr=1e-05"):
        compare(others, [0], tmp_path)


def test_language_models_are_compared_without_floor(llama, prose, tmp_path):
    arms = {"MoLA": tiny_settings(llama, prose, MOLA), "LoRA": tiny_settings(llama, prose)}

    comparison = compare(arms, [0], tmp_path)

    assert comparison.results["method"].tolist() == ["MoLA", "LoRA"]
    assert comparison.results["metric"].tolist() == ["perplexity"] * 2
    assert comparison.difference is None


def test_the_demo_compares_equals():
    mola, lora = demo().values()

    assert lora.method.match == mola.method
    assert mola.limit is None
    assert demo(quick=True, threads=1)["LoRA"].limit["train"] < 1000
