"""The figures of a study of composition, against the models' own answers."""

import numpy as np
import pandas as pd
import pytest
import torch
from tests.lab.studies.conftest import cell_of

from lamella.adapters import Factors
from lamella.lab.data import encode, load_backbone, load_task
from lamella.lab.studies.answers import divergence
from lamella.lab.studies.composition_results import KL, MIXTURE, interference, masking_table
from lamella.lab.studies.study import summarise


@pytest.fixture(scope="module")
def study(ran):
    return summarise(*ran)


@pytest.fixture(scope="module")
def rows(ran, study):
    return pd.read_parquet(ran[2].path / "results.parquet").set_index(["method", "seed", "task", "metric"])


def test_scores_are_what_the_loaded_models_answer(ran, rows):
    study, cells, folder = ran
    cell = cell_of(cells, "MOLE", 1)
    task = load_task(study.held_out["c"])
    backbone = load_backbone(folder.placed(cell.settings).model, task)
    model = cell.settings.method.load(backbone, task, folder.run(cell.key) / "adapter").eval()
    encoded = encode(task, backbone.tokenizer, max_length=32)
    answers = pd.read_parquet(folder.answers(cell.key))
    here = answers[answers["test"] == "c"]
    assert len(here) == 10

    known = {tuple(row["input_ids"]): row for row in encoded.test}
    right = 0
    for text, answer in zip(_ten(task), here.itertuples(), strict=True):
        row = known[tuple(backbone.tokenizer(text)["input_ids"])]
        with torch.no_grad():
            logits = model(**{k: v for k, v in encoded.collator([row]).items() if k != "labels"}).logits
        assert answer.log_probs == pytest.approx(logits.double().log_softmax(-1)[0].numpy(), abs=1e-5)
        right += int(logits.argmax()) == row["labels"]
    assert rows.loc[("MOLE", 1, "c", "accuracy"), "value"] == right / 10


def _ten(task):
    from lamella.lab.data.splitting import sample_rows

    return sample_rows(task.splits["test"], 10)["text"]


def test_what_is_kept_is_measured_against_the_lora_alone(ran, rows):
    _, cells, folder = ran
    for seed in (0, 1):
        assert rows.loc[("a LoRA", seed, "a", KL), "value"] == 0
        assert rows.loc[("only a", seed, "a", KL), "value"] == pytest.approx(0, abs=1e-9)
        assert rows.loc[("only a", seed, "a", "answers kept"), "value"] == 1
        assert rows.loc[("only a", seed, "a", "accuracy kept"), "value"] == 0
        assert rows.loc[("only a", seed, "b", KL), "value"] > 0
        own, found = (pd.read_parquet(folder.answers(cell_of(cells, name, seed).key)) for name in ("b LoRA", "uniform"))
        p, q = (np.stack(frame[frame["test"] == "b"]["log_probs"].to_list()) for frame in (own, found))
        expected = np.mean(
            [sum(np.exp(a) * (a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
        )
        assert rows.loc[("uniform", seed, "b", KL), "value"] == pytest.approx(expected)
        kept_accuracy = (
            rows.loc[("uniform", seed, "b", "accuracy"), "value"] - rows.loc[("b LoRA", seed, "b", "accuracy"), "value"]
        )
        assert rows.loc[("uniform", seed, "b", "accuracy kept"), "value"] == pytest.approx(kept_accuracy)
    assert not [index for index in rows.index if index[2] == "c" and index[3] != "accuracy"]


def test_the_mixture_is_all_sources_together(rows):
    for metric in ("accuracy", KL):
        for method in ("MOLE", "uniform", "joint LoRA", "no LoRA"):
            both = [rows.loc[(method, 0, test, metric), "value"] for test in ("a", "b")]
            assert rows.loc[(method, 0, MIXTURE, metric), "value"] == pytest.approx(np.mean(both))


def test_every_row_says_what_it_cost(ran, rows):
    assert (rows["status"] == "done").all()
    assert set(rows.loc["uniform", "trainable_parameters"]) == {0}
    assert set(rows.loc["X-LoRA", "trainable_parameters"]) == {32 * 2 + 2}
    assert (rows["build_seconds"] > 0).all()
    floors = rows[rows.index.get_level_values("metric") == "accuracy"]
    assert floors["floor_linear"].between(0, 1).all()


def test_what_a_mask_takes_is_measured_against_the_method_with_all_loras(ran, study, rows):
    masked = pd.read_parquet(ran[2].path / "masked.parquet").set_index(["method", "dropped", "seed", "task"])
    assert len(masked) == 2 * 2 * 2 * 4  # methods, LoRAs, seeds, tests with the mixture
    for seed in (0, 1):
        for test in ("a", "b", "c", MIXTURE):
            for method in ("MOLE", "uniform"):
                one = masked.loc[(method, "a", seed, test)]
                assert one["value"] == pytest.approx(rows.loc[("only b", seed, test, "accuracy"), "value"])
                assert one["value"] == pytest.approx(np.mean(one["scores"]))
    without = masked["value"].loc[("uniform", "b", slice(None), MIXTURE)].mean()
    change = without - rows["value"].loc[("uniform", slice(None), MIXTURE, "accuracy")].mean()
    (said,) = [note for note in study.notes if note.startswith("uniform with a LoRA left out")]
    assert f"without b on the mixture {without:.3f} ({change:+.3f} [" in said


def test_the_study_says_it_in_words_and_tables(ran, study):
    assert study.not_run == []
    assert not [finding for finding in study.findings if finding.severity == "error"]
    assert list(study.results["task"].unique()) == [MIXTURE, "c", f"{MIXTURE}, what is kept"]
    verdict, others, elsewhere = study.summary.splitlines()
    assert "On mixture with " in verdict  # behind a floor that tiny models may not reach
    assert "MOLE accuracy 0." in verdict
    assert others.startswith("20 test rows, 2 seed(s).")
    assert elsewhere.startswith("Elsewhere MOLE against ")
    table = study.results.set_index(["task", "method"])
    assert table.loc[(MIXTURE, "MOLE"), "difference"] == "reference"
    assert {"floor (linear)", "floor (majority)"} <= set(study.results["method"])
    names = ["MOLE", "uniform", "only a", "X-LoRA", "only b", "a LoRA", "b LoRA", "joint LoRA", "no LoRA"]
    assert list(study.cost["method"]) == names
    assert (study.cost["building seconds"] > 0).all()
    assert any("a and b: cosine" in note for note in study.notes)
    (left,) = [note for note in study.notes if note.startswith("The doctor did not examine")]
    assert "uniform, only a, X-LoRA, only b" in left
    masked, examples = (pd.read_parquet(ran[2].path / f"{name}.parquet") for name in ("masked", "examples"))
    heads, lines = masking_table(masked, examples)
    assert heads == ["method", "dropped", "a", "b", "c", MIXTURE]
    assert [line[:2] for line in lines] == [[method, lora] for method in ("MOLE", "uniform") for lora in "ab"]


def test_divergence_of_known_distributions():
    p, q = np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.25, 0.75], [0.9, 0.1]])

    found = divergence(np.log(p), np.log(q))

    assert found == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0])


def test_interference_of_known_deltas():
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
