"""The figures of a study of composition, against the models' own answers."""

import numpy as np
import pandas as pd
import pytest
import torch

from lamella.adapters import Factors
from lamella.lab.data import encode, load_backbone, load_task
from lamella.lab.evidence.evidence_page import evidence_page
from lamella.lab.studies.composition import kept
from lamella.lab.studies.composition.answers import divergence
from lamella.lab.studies.composition.grid import ACCURACY, read_composition
from lamella.lab.studies.composition.interference import interference
from lamella.lab.studies.composition.kept import keep_composition, load_composition
from lamella.lab.studies.composition.study import summarise_composition
from lamella.lab.studies.composition.tables import KL, MIXTURE


@pytest.fixture(scope="module")
def study(ran):
    return summarise_composition("study", *ran)


@pytest.fixture(scope="module")
def rows(ran, study):
    return pd.read_parquet(ran[2].path / "results.parquet").set_index(["method", "seed", "task", "metric"])


def cell_of(stages, method, seed):
    return next(cell for cell in stages.all if (cell.method, cell.seed) == (method, seed))


def test_scores_are_what_the_loaded_models_answer(ran, rows):
    grid, stages, folder = ran
    cell = cell_of(stages, "MOLE", 1)
    task = load_task(grid.held_out["c"])
    backbone = load_backbone(cell.settings.model, task)
    model = cell.settings.method.load(backbone, task, folder.run(cell.key) / "adapter").eval()
    encoded = encode(task, backbone.tokenizer, max_length=32)
    answers = pd.read_parquet(folder.answers(cell.key))
    here = answers[answers["test"] == "c"]
    assert len(here) == 10

    known = {tuple(row["input_ids"]): row for row in encoded.test}
    right = 0
    for text, stated in zip(_ten(task), here.itertuples(), strict=True):
        row = known[tuple(backbone.tokenizer(text)["input_ids"])]
        with torch.no_grad():
            logits = model(**{k: v for k, v in encoded.collator([row]).items() if k != "labels"}).logits
        assert stated.log_probs == pytest.approx(logits.double().log_softmax(-1)[0].numpy(), abs=1e-5)
        right += int(logits.argmax()) == row["labels"]
    assert rows.loc[("MOLE", 1, "c", ACCURACY), "value"] == right / 10


def _ten(task):
    from lamella.lab.data.splitting import sample_rows

    return sample_rows(task.splits["test"], 10)["text"]


def test_what_is_kept_is_measured_against_the_lora_alone(ran, rows):
    _, stages, folder = ran
    for seed in (0, 1):
        assert rows.loc[("a LoRA", seed, "a", KL), "value"] == 0
        assert rows.loc[("only a", seed, "a", KL), "value"] == pytest.approx(0, abs=1e-9)
        assert rows.loc[("only a", seed, "a", "answers kept"), "value"] == 1
        assert rows.loc[("only a", seed, "a", "accuracy kept"), "value"] == 0
        assert rows.loc[("only a", seed, "b", KL), "value"] > 0
        own, found = (
            pd.read_parquet(folder.answers(cell_of(stages, name, seed).key)) for name in ("b LoRA", "uniform")
        )
        p, q = (np.stack(frame[frame["test"] == "b"]["log_probs"].to_list()) for frame in (own, found))
        by_hand = np.mean(
            [sum(np.exp(a) * (a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
        )
        assert rows.loc[("uniform", seed, "b", KL), "value"] == pytest.approx(by_hand)
        kept_accuracy = (
            rows.loc[("uniform", seed, "b", ACCURACY), "value"] - rows.loc[("b LoRA", seed, "b", ACCURACY), "value"]
        )
        assert rows.loc[("uniform", seed, "b", "accuracy kept"), "value"] == pytest.approx(kept_accuracy)
    assert not [index for index in rows.index if index[2] == "c" and index[3] != ACCURACY]


def test_the_mixture_is_all_sources_together(rows):
    for metric in (ACCURACY, KL):
        for method in ("MOLE", "uniform", "joint LoRA", "no LoRA"):
            both = [rows.loc[(method, 0, test, metric), "value"] for test in ("a", "b")]
            assert rows.loc[(method, 0, MIXTURE, metric), "value"] == pytest.approx(np.mean(both))


def test_every_row_says_what_it_cost(ran, rows):
    assert (rows["status"] == "done").all()
    assert set(rows.loc["uniform", "trainable_parameters"]) == {0}
    assert set(rows.loc["X-LoRA", "trainable_parameters"]) == {32 * 2 + 2}
    assert (rows["seconds"] > 0).all()
    floors = rows[rows.index.get_level_values("metric") == ACCURACY]
    assert floors["floor_linear"].between(0, 1).all()


def test_what_a_mask_takes_is_measured_against_the_whole_arm(ran, study, rows):
    masked = pd.read_parquet(ran[2].path / "masked.parquet").set_index(["method", "dropped", "seed", "task"])
    assert len(masked) == 2 * 2 * 2 * 4  # arms, LoRAs, seeds, tests with the mixture
    for seed in (0, 1):
        for test in ("a", "b", "c", MIXTURE):
            for arm in ("MOLE", "uniform"):
                one = masked.loc[(arm, "a", seed, test)]
                assert one["value"] == pytest.approx(rows.loc[("only b", seed, test, ACCURACY), "value"])
                assert one["value"] == pytest.approx(np.mean(one["scores"]))
    without = masked["value"].loc[("uniform", "b", slice(None), MIXTURE)].mean()
    change = without - rows["value"].loc[("uniform", slice(None), MIXTURE, ACCURACY)].mean()
    (said,) = [note for note in study.notes if note.startswith("uniform with a LoRA left out")]
    assert f"without b on the mixture {without:.3f} ({change:+.3f} [" in said


def test_the_study_says_it_in_words_and_tables(study):
    assert study.not_run == []
    assert not [finding for finding in study.findings if finding.severity == "error"]
    assert study.headline == (MIXTURE, "c", f"{MIXTURE}, what is kept")
    assert "On mixture, mean accuracy over 2 seed(s): MOLE 0." in study.summary
    table = study.results.set_index(["task", "method"])
    assert table.loc[(MIXTURE, "MOLE"), "difference"] == "reference"
    assert {"floor (linear)", "floor (majority)"} <= set(study.results["method"])
    assert list(study.cost["method"]) == [
        "MOLE",
        "uniform",
        "only a",
        "X-LoRA",
        "only b",
        "a LoRA",
        "b LoRA",
        "joint LoRA",
        "no LoRA",
    ]
    assert any("a and b: cosine" in note for note in study.notes)


def test_kept_and_loaded_it_says_the_same(ran, recipe, study, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "read_composition", lambda name: read_composition(recipe))
    folder = ran[2].path

    name = keep_composition(folder, tmp_path / "kept")
    found = load_composition(name, tmp_path / "kept")

    assert (found.run, found.planned) == (18, 18)
    table = study.results.set_index(["task", "method"])
    for standing in found.standings:
        for arm, tests in standing.tests.items():
            assert np.mean(list(tests.values())) == pytest.approx(table.loc[(standing.task, arm), "mean"])
        for one in standing.against_reference:
            assert str(one.interval) == table.loc[(standing.task, one.first), "difference"]
    page = evidence_page([found])
    assert "### Does it beat the other ways to compose them?" in page
    assert "### How much of each LoRA is kept?" in page
    assert "a and b: cosine" in page
    assert "| arm | dropped | a | b | c | mixture |" in page
    nothing = load_composition(name, tmp_path / "nowhere")
    assert (nothing.run, nothing.planned) == (0, 18)
    assert "*not run*" in evidence_page([nothing])


def test_a_kept_study_with_another_recipe_is_refused(ran, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "read_composition", lambda name: read_composition(recipe, ["rows=13"]))

    with pytest.raises(ValueError, match="rows differs"):
        keep_composition(ran[2].path, tmp_path)
    assert not list(tmp_path.iterdir())


def test_divergence_by_hand():
    p, q = np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.25, 0.75], [0.9, 0.1]])

    found = divergence(np.log(p), np.log(q))

    assert found == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0])


def test_interference_by_hand():
    A, B = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    one = {"m": Factors(A, B, 2.0), "n": Factors(A, B, 1.0)}
    other = {"m": Factors(A, torch.tensor([[1.0, 2.0], [3.0, 5.0]]), 1.0)}

    (row,) = interference({"x": one, "y": other}).to_dict("records")

    # deltas of m: [[2, -4], [6, 0]] and [[1, 2], [3, 5]]; only x has n, of squared length 14
    assert row["cosine"] == pytest.approx((2 - 8 + 18) / ((56 + 14) ** 0.5 * 39**0.5))
    assert row["sign_conflict"] == pytest.approx(1 / 3)
    assert (row["first"], row["second"]) == ("x", "y")


def test_loras_without_a_common_module_have_no_cosine():
    A, B = torch.ones(1, 2), torch.ones(2, 1)

    (row,) = interference({"x": {"m": Factors(A, B, 1.0)}, "y": {"n": Factors(A, B, 1.0)}}).to_dict("records")

    assert np.isnan(row["cosine"])
    assert np.isnan(row["sign_conflict"])
