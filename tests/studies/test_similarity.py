import json
from itertools import pairwise

import pandas as pd
import pytest
from studies.similarity import keep_similarity, kept_similarity, similarity_page
from tests.similarity.test_reliability import KINDS, alignment, by_kind

from lamella.errors import LamellaError


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps({"model": "tiny", "text": "news"}))
    alignment(by_kind).to_parquet(folder / "alignment.parquet")
    return folder


def swaps():
    """All layers of four: the effect is a tenth of the distance, and 1 with random weights."""
    places = [(a, b) for a in range(4) for b in range(a, 4)] + [(0, -1)]
    return pd.DataFrame([
        {"unit": "block", "metric": "nll", "first_layer": a, "first_expert": -1, "second_layer": b, "second_expert": -1,
         "exchange": b >= 0, "aligned": False, "distance": float("nan") if b < 0 else float(b - a), "baseline": 4.0,
         "effect": 1.0 if b < 0 else 0.1 * (b - a), "value": 4.0 + (1.0 if b < 0 else 0.1 * (b - a)), "seed": 0}
        for a, b in places
    ])  # fmt: skip


def compression():
    return pd.DataFrame([
        {"method": method, "budget": budget, "parameters": 1, "domain": "news", "perplexity": 1.0, "baseline": 1.0,
         "ratio": ratio, "low": ratio - 0.002, "high": ratio + 0.002, "experts_left": 1, "seed": 0}
        for method, ratios in (("similarity", (1.001, 1.005, 1.02)), ("random", (1.02, 1.1, 1.3)))
        for budget, ratio in zip((0.9, 0.75, 0.5), ratios, strict=True)
    ])  # fmt: skip


def page(study, tmp_path):
    keep_similarity(study, tmp_path / "kept")
    return similarity_page(kept_similarity(tmp_path / "kept"))


def test_only_what_was_run_is_answered(study, tmp_path):
    text = page(study, tmp_path)
    assert "**tiny.**" in text
    assert "| a random expert | 10 | 0.9" in text
    assert "swap" not in text.lower().split("rows are in")[1].split("## ")[-1]
    assert "merged" not in text
    lines = text.split("\n")
    assert all(not before or before.startswith("|") for before, line in pairwise(lines) if line.startswith("|"))
    assert not [line for line in lines if "|" in line and not line.startswith("|")]  # a table begins its line


def test_variance_and_ceiling_are_said_with_their_figures(study, tmp_path):
    text = page(study, tmp_path)
    assert "The outlier by raw error, expert 3 of layer 0" in text
    assert "with 1.00: the ceiling" in text
    assert "| difference of both directions | 20 | 0.0" in text


def test_a_known_truth_is_asked_for_its_auc(study, tmp_path):
    truth = {"layers": [0, 1], "experts": [{"expert": e, "kind": KINDS[0, e]} for e in range(4)]}
    (study / "ground_truth.json").write_text(json.dumps(truth))
    text = page(study, tmp_path)
    assert "| behind the aligner linear | 1.00 [1.00, 1.00] | 4 |" in text
    assert "| without aligner | 0.50 [0.50, 0.50] | 4 |" in text


def test_a_screen_without_a_measure_says_nothing_of_it(study, tmp_path):
    truth = {"layers": [0, 1], "experts": [{"expert": e, "kind": KINDS[0, e]} for e in range(4)]}
    (study / "ground_truth.json").write_text(json.dumps(truth))
    pairs = alignment(by_kind, seeds=(0,)).query("kind == 'pair'")
    screened = pairs.assign(floor=0.0, cka_distance=pairs["nmse"], weight_distance=float("nan"))
    screened.drop(columns=["nmse", "kind"]).to_parquet(study / "screen.parquet")
    text = page(study, tmp_path)
    assert "| cka distance | 1.00 [1.00, 1.00] | 4 |" in text
    assert "weight distance" not in text


def test_swaps_merging_and_controls_stand_as_tables(study, tmp_path):
    swaps().to_parquet(study / "swap.parquet")
    compression().to_parquet(study / "compression.parquet")
    text = page(study, tmp_path)
    assert "0: +0.0000 (4), 1: +0.1000 (3), 2: +0.2000 (2), 3: +0.3000 (1) | +1.0000 (1) |" in text
    assert "| block, nll | cannot be told with 4 layers to grow or to shrink | +0.1000 | 1.00 | 0.083 | 6 |" in text
    assert "| **2** | 4.2000 | 4.1000 | 4.0000 | 4.1000 |" in text  # an exchange stands in both of its cells
    assert "| similarity | news | 25% (25% to 25%) |" in text
    assert "| random | news | 0% (0% to 0%) |" in text


def test_nothing_to_keep_is_an_error_and_leaves_nothing(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "study.json").write_text("{}")
    with pytest.raises(LamellaError, match="no alignment and no swaps"):
        keep_similarity(folder, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    assert similarity_page(kept_similarity(tmp_path / "kept")) == ""
