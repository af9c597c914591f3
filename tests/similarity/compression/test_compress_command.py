"""`lamella similarity compress`: with which aligners, and what is refused before the long work."""

import json
import math
import shutil

import pandas as pd
import pytest
from tests.cli.test_similarity import WORDS, run, save_model
from transformers import AutoTokenizer

from lamella.similarity import Compressed, steps

QUICK = ("--budget", 0.9, "--documents", 4, "--seeds", 1)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A study whose experts were aligned by the published kind and by one that can be folded."""
    folder = tmp_path_factory.mktemp("study")
    lines = [" ".join(WORDS[(7 * d + d * t + t * t) % len(WORDS)] for t in range(8 + d % 9)) for d in range(48)]
    (folder / "text.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    model, study = save_model("qwen2_moe", folder / "model"), folder / "study"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "capture", model, "--text", folder / "text.txt", "-o", study, "--per-expert", 48) == 0
        kinds = ("--aligner", "layernorm", "--aligner", "low-rank")
        assert run(patch, "align", study, "--seeds", 1, "--steps", 3, "--lr", 0.002, *kinds) == 0
    return study


@pytest.fixture
def study(aligned, tmp_path):
    """A copy to write to."""
    return shutil.copytree(aligned, tmp_path / "study")


@pytest.fixture
def calls(monkeypatch):
    """With which settings aligners were trained."""
    settings, fit = [], steps.fit_aligners

    def fitted(*args, **given):
        settings.append(given)
        return fit(*args, **given)

    monkeypatch.setattr(steps, "fit_aligners", fitted)
    return settings


def forbid(monkeypatch):
    def long_work(*args, **settings):
        raise AssertionError("the long work has begun")

    monkeypatch.setattr(steps, "compression_curve", long_work)


def keep(study, *kinds):
    alignment = pd.read_parquet(study / "alignment.parquet")
    alignment[alignment["aligner"].isin(kinds)].to_parquet(study / "alignment.parquet")


def test_routes_go_by_the_aligner_that_can_be_folded(study, calls, monkeypatch):
    assert run(monkeypatch, "compress", study, *QUICK, "--method", "usage", "--capacity", 1) == 0
    assert calls
    assert all(given == {"aligner": "low-rank", "steps": 3, "lr": 0.002, "pull": None} for given in calls)
    rerouted = pd.read_parquet(study / "rerouting.parquet")
    assert set(rerouted["how"]) == {"similar", "similar+aligner", "drop", "next-choice"}
    assert set(rerouted["what"]) == {"dropped", "masked", "full"}


def test_where_none_can_be_folded_linear_ones_go_before_the_most_similar_as_it_is(study, calls, monkeypatch):
    keep(study, "layernorm")
    measures, rerouting = [], steps.rerouting_table

    def noted(*args, **settings):
        measures.append(settings["measure"])
        return rerouting(*args, **settings)

    monkeypatch.setattr(steps, "rerouting_table", noted)
    assert run(monkeypatch, "compress", study, *QUICK, "--method", "usage") == 0
    assert set(measures) == {"identity_nmse"}
    assert all(given == {"aligner": "linear", "steps": 3, "lr": 0.002, "pull": None} for given in calls)
    assert calls


def test_an_aligner_that_was_scored_on_another_text_goes_by_its_kind(study, calls, monkeypatch):
    alignment = pd.read_parquet(study / "alignment.parquet")
    named = alignment.assign(aligner=alignment["aligner"].replace("low-rank", "low-rank, scored on b.txt (train)"))
    named.drop(columns="scored_on").to_parquet(study / "alignment.parquet")
    assert run(monkeypatch, "compress", study, *QUICK, "--method", "usage") == 0
    assert {given["aligner"] for given in calls} == {"low-rank"}


def test_the_curve_goes_behind_aligners_and_is_saved_so(study, calls, tmp_path, monkeypatch):
    words = ("--replace", "--aligner", "low-rank", "--close", 0, "--save", tmp_path / "small")
    assert run(monkeypatch, "compress", study, *QUICK, "--method", "similarity", *words) == 0
    assert {given["aligner"] for given in calls} == {"low-rank"}
    small = Compressed.load(tmp_path / "small")
    assert (small.report.measure, small.report.merged) == ("nmse", False)
    assert any("aligner" in name or name.endswith("up_bias") for name, _ in small.model.named_parameters())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "small")) == len(WORDS) + 3
    assert not (study / "rerouting.parquet").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--aligner", "linear"), "has no aligner 'linear', it has layernorm; low-rank."),
        (("--measure", "identity_nmse", "--measure", "beauty"), "no column beauty"),
        (("--method", "usage", "--method", "beauty"), "method='beauty'"),
        (("--budget", 0.9, "--budget", 2), "budget=2"),
        (("--save", "here"), "exists already"),
    ],
)
def test_what_cannot_be_is_refused_before_the_long_work(words, said, study, monkeypatch, capsys):
    (study / "here").mkdir()
    (study / "here" / "thesis.txt").write_text("years")
    monkeypatch.chdir(study)
    forbid(monkeypatch)
    assert run(monkeypatch, "compress", study, *words) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert (study / "here" / "thesis.txt").read_text() == "years"


def test_a_closed_expert_that_was_compared_with_none_is_named_before_the_long_work(study, monkeypatch, capsys):
    forbid(monkeypatch)
    alignment = pd.read_parquet(study / "alignment.parquet")
    alignment[alignment["source_layer"] != 1].to_parquet(study / "alignment.parquet")
    assert run(monkeypatch, "compress", study) == 2
    assert "no expert that could replace" in " ".join(capsys.readouterr().err.split())


def test_a_budget_out_of_reach_is_told_with_one_that_is_in_reach(study, monkeypatch, capsys):
    assert run(monkeypatch, "compress", study, "--budget", 0.1, "--method", "usage", "--close", 0) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "A budget of 0.1 of the experts' parameters cannot be reached" in said
    assert "Give a budget of 0.25 or more" in said


def test_a_second_compression_stands_beside_the_first_or_says_what_it_replaces(study, monkeypatch, capsys):
    quick = ("compress", study, *QUICK, "--close", 0)
    assert run(monkeypatch, *quick, "--method", "usage") == 0
    assert run(monkeypatch, *quick, "--method", "random") == 0
    assert "replaced" not in capsys.readouterr().out
    assert list(pd.read_parquet(study / "compression.parquet")["method"]) == ["usage", "random"]
    assert run(monkeypatch, *quick, "--method", "random") == 0
    assert list(pd.read_parquet(study / "compression.parquet")["method"]) == ["usage", "random"]
    capsys.readouterr()
    assert run(monkeypatch, *quick, "--method", "usage", "--replace") == 0
    assert "Note: 2 rows of an earlier compression (merge True, aligner None" in capsys.readouterr().out
    assert list(pd.read_parquet(study / "compression.parquet")["method"]) == ["usage"]


def test_rerouting_says_what_it_replaces(study, monkeypatch, capsys):
    quick = ("compress", study, *QUICK, "--method", "usage")
    for _ in range(2):
        assert run(monkeypatch, *quick) == 0
        assert "earlier rerouting" not in capsys.readouterr().out
    assert run(monkeypatch, *quick, "--close", 2) == 0
    assert "rows of an earlier rerouting, of other experts or texts, are replaced." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ({0.9: 1.0, 0.75: 1.001}, "at least 25%, the most tried, of the experts' parameters can go before perplexity "
         "rises by 1 % (surely 25%, perhaps more than 25%, the most tried)"),
        ({0.9: 1.0, 0.75: 1.008, 0.5: 1.3}, "25% of the experts' parameters can go before perplexity rises by 1 % "
         "(surely 10%, perhaps 25%)"),
    ],
)  # fmt: skip
def test_nothing_is_said_of_what_was_not_tried(ratios, said, study, monkeypatch, capsys):
    rows = [
        {"method": "similarity", "domain": "news", "budget": budget, "ratio": ratio, "low": ratio - 0.005,
         "high": ratio + 0.005, "parameters": 1, "perplexity": 1.0, "baseline": 1.0, "experts_left": 1, "seed": 0}
        for budget, ratio in ratios.items()
    ]  # fmt: skip
    monkeypatch.setattr(steps, "compression_curve", lambda *args, **settings: pd.DataFrame(rows))
    assert run(monkeypatch, "compress", study, "--method", "similarity", "--close", 0) == 0
    assert f"similarity on news: {said}" in capsys.readouterr().out
    assert run(monkeypatch, "compress", study, "--method", "similarity", "--close", 0, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["within 1 %"]
    assert row["high"] == (None if math.isclose(row["removed"], row["largest"]) else 0.25)
