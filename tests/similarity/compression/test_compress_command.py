"""`lamella similarity compress`: with which aligners, and what is refused before the long work."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import transformers
from tests.cli.test_similarity import WORDS, run, save_model
from transformers import AutoTokenizer

import lamella
from lamella.cli.similarity.subject import load
from lamella.similarity import Compressed, reroute, steps
from lamella.similarity.compression import Saved, perplexity
from lamella.similarity.study import Study, StudyFolder
from lamella.similarity.swapping.scores import text_scores
from lamella.texts import text_batches

QUICK = ("--budget", 0.75, "--documents", 4, "--seeds", 1)


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


def forbid(monkeypatch, room=steps, name="compression_curve"):
    def long_work(*args, **settings):
        raise AssertionError("the long work has begun")

    monkeypatch.setattr(room, name, long_work)


def keep(study, *kinds):
    alignment = pd.read_parquet(study / "alignment.parquet")
    alignment[alignment["aligner"].isin(kinds)].to_parquet(study / "alignment.parquet")


def test_routes_go_by_the_aligner_that_can_be_folded(study, calls, monkeypatch):
    assert run(monkeypatch, "compress", study, *QUICK, "--criterion", "reap", "--capacity", 1) == 0
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
    assert run(monkeypatch, "compress", study, *QUICK, "--criterion", "reap") == 0
    assert set(measures) == {"identity_nmse"}
    assert all(given == {"aligner": "linear", "steps": 3, "lr": 0.002, "pull": None} for given in calls)
    assert calls


def test_an_aligner_that_was_scored_on_another_text_goes_by_its_kind(study, calls, monkeypatch):
    alignment = pd.read_parquet(study / "alignment.parquet")
    named = alignment.assign(aligner=alignment["aligner"].replace("low-rank", "low-rank, scored on b.txt (train)"))
    named.drop(columns="scored_on").to_parquet(study / "alignment.parquet")
    assert run(monkeypatch, "compress", study, *QUICK, "--criterion", "reap") == 0
    assert {given["aligner"] for given in calls} == {"low-rank"}


def test_what_is_saved_is_what_was_measured(study, tmp_path, monkeypatch, capsys):
    for scope, name in (("layer", "even"), ("model", "uneven")):
        words = ("--criterion", "reconstruction", "--scope", scope, "--close", 0, "--save", tmp_path / name)
        assert run(monkeypatch, "compress", study, *QUICK, *words) == 0
        small = Compressed.load(tmp_path / name)
        assert (small.report.criterion, small.report.scope, small.report.budget) == ("reconstruction", scope, 0.75)
        said = " ".join(capsys.readouterr().out.split())
        assert f"Wrote {tmp_path / name}: 9 of 12 experts left (by reconstruction, keeping 75.0%)" in said
        assert f"{small.report.parameters:,} of {small.report.parameters_before:,} parameters" in said
        opened = Saved.read(tmp_path / name).as_dict()["open"]
        assert f"Open it with {opened}." in said
        assert eval(opened, {"transformers": transformers, "lamella": lamella}).num_parameters() > 0
        rows = pd.read_parquet(study / "compression.parquet")
        (row,) = rows[rows["scope"] == scope].to_dict("records")
        folder = StudyFolder(study)
        texts = text_batches(
            Path(folder.subject().text), AutoTokenizer.from_pretrained(tmp_path / name), "test", 256, 8, 4
        )
        assert text_scores(small.model, list(texts), "nll").perplexity == pytest.approx(row["perplexity"], rel=1e-6)
    assert (tmp_path / "even" / "model.safetensors").exists()
    assert not (study / "rerouting.parquet").exists()


def test_a_study_without_an_alignment_says_what_it_leaves_out(study, monkeypatch, capsys):
    (study / "alignment.parquet").unlink()
    assert run(monkeypatch, "compress", study, *QUICK, "--criterion", "reap") == 0
    said = capsys.readouterr().out
    assert "Nothing was aligned, so no tokens were rerouted." in said
    assert said.startswith("You can drop 3 of 12 experts (")
    assert "--criterion reap --scope model --save FOLDER" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--aligner", "linear"), "has no aligner 'linear', it has layernorm; low-rank."),
        (("--criterion", "reap", "--criterion", "beauty"), "criterion='beauty'"),
        (("--scope", "block"), "scope='block' is not one of layer, model"),
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


def test_two_processes_do_not_compress_in_one_folder(study, monkeypatch, capsys):
    forbid(monkeypatch)
    with StudyFolder(study).alone("compress_to_budgets"):
        assert run(monkeypatch, "compress", study) == 2
    assert "Another process is at work on this step of the study" in " ".join(capsys.readouterr().err.split())


def test_damages_are_a_table_to_serve_by(study, monkeypatch, capsys):
    assert run(monkeypatch, "damages", study) == 0
    assert "36 ordered pairs. Squared error" in capsys.readouterr().out
    table = pd.read_parquet(study / "damages.parquet")
    model = Study.open(study, load).model
    with reroute(model, [(0, 1), (0, 2), (0, 3)], what="limited", limit=2, damage=table):
        pass


def test_a_closed_expert_that_was_compared_with_none_is_named_before_the_long_work(study, monkeypatch, capsys):
    forbid(monkeypatch)
    alignment = pd.read_parquet(study / "alignment.parquet")
    alignment[alignment["source_layer"] != 1].to_parquet(study / "alignment.parquet")
    assert run(monkeypatch, "compress", study) == 2
    assert "no expert that could replace" in " ".join(capsys.readouterr().err.split())


def test_a_budget_out_of_reach_is_told_with_one_that_is_in_reach(study, monkeypatch, capsys):
    assert run(monkeypatch, "compress", study, "--budget", 0.3, "--criterion", "reap", "--close", 0) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "A budget of 0.3 keeps 3 of 12 experts, but at most 6 can go by reap" in said
    assert "give a budget of 0.5 or more" in said


def test_a_second_compression_stands_beside_the_first(study, monkeypatch, capsys):
    quick = ("compress", study, *QUICK, "--close", 0)
    assert run(monkeypatch, *quick, "--criterion", "reap") == 0
    assert run(monkeypatch, *quick, "--criterion", "random") == 0
    assert list(pd.read_parquet(study / "compression.parquet")["method"]) == ["reap", "random"]
    assert run(monkeypatch, *quick, "--criterion", "random") == 0
    assert list(pd.read_parquet(study / "compression.parquet")["method"]) == ["reap", "random"]
    assert run(monkeypatch, *quick, "--criterion", "reap", "--scope", "layer") == 0
    assert "replaced" not in capsys.readouterr().out
    table = pd.read_parquet(study / "compression.parquet")
    assert list(zip(table["method"], table["scope"], table["distil"], strict=True)) == [
        ("reap", "model", 0), ("random", "model", 0), ("reap", "layer", 1)
    ]  # fmt: skip
    forbid(monkeypatch, perplexity, "compress_each")  # both scopes are known
    assert run(monkeypatch, *quick, "--criterion", "reap") == 0
    assert len(pd.read_parquet(study / "compression.parquet")) == 3


def test_a_table_of_an_earlier_edition_goes_on_where_its_settings_are_known(study, monkeypatch, capsys):
    quick = ("compress", study, *QUICK, "--close", 0)
    assert run(monkeypatch, *quick, "--criterion", "reap") == 0
    path, note = study / "compression.parquet", study / "compression.json"
    table = pd.read_parquet(path)
    older = table.drop(columns=["scope", "weighted", "refit", "distil", "measured_on"])
    older.attrs = table.attrs
    for noted, said in ((True, False), (False, True)):
        older.to_parquet(path)
        settings = {name: table[name].iloc[0].item() for name in ("refit", "distil")}
        settings |= {name: table[name].iloc[0] for name in ("scope", "measured_on")}
        note.write_text(json.dumps(settings)) if noted else note.unlink()
        capsys.readouterr()
        assert run(monkeypatch, *quick, "--criterion", "random") == 0
        assert ("of unknown settings, are replaced" in capsys.readouterr().out) is said
        assert list(pd.read_parquet(path)["method"]) == (["reap", "random"] if noted else ["random"])


def test_rerouting_says_what_it_replaces(study, monkeypatch, capsys):
    quick = ("compress", study, *QUICK, "--criterion", "reap")
    for _ in range(2):
        assert run(monkeypatch, *quick) == 0
        assert "earlier rerouting" not in capsys.readouterr().out
    assert run(monkeypatch, *quick, "--close", 2) == 0
    assert "rows of an earlier rerouting, of other experts or texts, are replaced." in capsys.readouterr().out
