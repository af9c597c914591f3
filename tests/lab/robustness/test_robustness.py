import shutil

import numpy as np
import pandas as pd
import pytest
from tests.lab.tiny_runs import MOLA, question_task, tiny_settings

from lamella.errors import LamellaError
from lamella.lab.robustness.comparison import check_folder, robustness, strengths_of
from lamella.lab.robustness.noisy import NOISES, noisy_scores
from lamella.lab.runs.evaluating import evaluate
from lamella.lab.runs.run import train
from lamella.lab.runs.trained import load_trained
from lamella.progress import listening
from lamella.statistics import paired_interval


@pytest.fixture(scope="module")
def runs(finished_run, bert, questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust")
    methods = {"mola": (MOLA, False), "lora": ("lora", False), "prose-mola": (MOLA, True), "prose-lora": ("lora", True)}
    again = train(tiny_settings(bert, questions, "lora", seed=1), folder / "lora-again").folder.path
    return {"lora-again": again} | {
        name: shutil.copytree(finished_run(*method).folder.path, folder / name) for name, method in methods.items()
    }


@pytest.fixture(scope="module")
def found(runs):
    return robustness([runs["mola"], runs["lora"]], "embedding", [1.0, 4.0], seeds=3, split="validation")


def test_the_frame_has_a_row_per_run_strength_seed_and_metric(found):
    frame = found.frame
    assert list(frame.columns) == ["run", "method", "noise", "strength", "seed", "metric", "value"]
    assert len(frame) == 2 * 3 * 3 * 3
    assert not frame.duplicated(["run", "strength", "seed", "metric"]).any()
    assert set(frame["strength"]) == {0.0, 1.0, 4.0}
    assert (set(frame["noise"]), set(frame["method"])) == ({"embedding"}, {"mola", "lora"})
    assert (found.split, found.rows, found.metric, found.seeds) == ("validation", 16, "accuracy", 3)
    noisy = frame[(frame["strength"] == 4.0) & (frame["metric"] == "loss")]
    assert noisy.groupby("run")["value"].nunique().tolist() == [3, 3]


def test_without_noise_it_is_what_evaluate_says(found, runs):
    for name in ("mola", "lora"):
        expected = evaluate(runs[name], split="validation").metrics
        rows = found.frame[(found.frame["run"] == name) & (found.frame["strength"] == 0.0)]
        for _, one in rows.groupby("seed"):
            assert dict(zip(one["metric"], one["value"], strict=True)) == expected


def test_differences_are_paired_over_seeds_and_rows(found, runs):
    correct = {}
    for name in ("mola", "lora"):
        trained = load_trained(runs[name])
        rows, encoded = trained.rows("validation")
        kind = NOISES["embedding"]
        scores = [noisy_scores(trained, rows, encoded.collator, kind, 4.0, seed) for seed in range(3)]
        correct[name] = np.stack([one.columns["correct"] for one in scores]).astype(float)
    expected = paired_interval(correct["lora"], correct["mola"])
    row = found.differences[found.differences["strength"] == 4.0].iloc[0]
    assert (row["run"], row["against"], row["measure"]) == ("lora", "mola", "accuracy")
    assert (row["difference"], row["low"], row["high"], row["p"]) == (
        expected.difference,
        expected.low,
        expected.high,
        expected.p_value,
    )
    assert list(found.differences["strength"]) == [0.0, 1.0, 4.0]


def test_the_means_and_the_answer_in_words(found):
    means = found.means
    assert (list(means.index), list(means.columns)) == (["mola", "lora"], [0.0, 1.0, 4.0])
    rows = found.frame.query("run == 'lora' and strength == 4 and metric == 'accuracy'")
    assert means.loc["lora", 4.0] == pytest.approx(rows["value"].mean())
    for words in (
        "On 16 validation rows",
        "Gaussian noise on embeddings at sigma 4",
        "over 3 seed(s)",
        "lora minus mola",
    ):
        assert words in found.summary
    assert any("3 noise seed(s) were drawn" in note for note in found.notes)


def test_language_models_are_compared_by_their_loss_per_token(runs):
    found = robustness([runs["prose-lora"], runs["prose-mola"]], "tokens", [0.5], seeds=2)
    assert found.metric == "perplexity"
    row = found.differences[found.differences["strength"] == 0.5].iloc[0]
    loss = found.frame[(found.frame["metric"] == "loss") & (found.frame["strength"] == 0.5)]
    means = loss.groupby("run")["value"].mean()
    assert row["measure"] == "loss"
    assert row["difference"] == pytest.approx(means["prose-mola"] - means["prose-lora"], abs=1e-6)


def test_runs_of_one_method_get_different_names(runs):
    found = robustness([runs["lora"], runs["lora-again"], runs["mola"]], "tokens", [0.2], seeds=1)
    assert list(found.means.index) == ["lora · lora", "lora · lora-again", "mola"]
    assert found.sizes["lora · lora"] == found.sizes["lora · lora-again"]


def test_folders_of_one_name_get_different_names(runs, tmp_path):
    shutil.copytree(runs["mola"], tmp_path / "lora")
    found = robustness([runs["lora"], tmp_path / "lora"], "tokens", [0.2], seeds=1)
    assert set(found.frame["run"]) == {str(runs["lora"]), str(tmp_path / "lora")}


def test_adapters_on_their_own_need_a_task(runs, bert, questions, tmp_path):
    shutil.copytree(runs["lora"] / "adapter", tmp_path / "alone")
    paths = [tmp_path / "alone", runs["mola"]]
    with pytest.raises(LamellaError, match="alone of a task it does not name"):
        robustness(paths, "tokens", [0.2], seeds=1)
    found = robustness(paths, "tokens", [0.2], seeds=1, task=questions, base=bert)
    assert list(found.means.index) == ["alone", "mola"]


def test_it_says_what_it_is_doing(runs):
    said = []
    with listening(said.append):
        robustness([runs["lora"]], "tokens", [0.1], seeds=2)
    assert {"scoring", "runs under noise"} < {work.name for work in said}
    assert [work.total for work in said if work.name == "lora"] == [2, 2]


def test_saved_frames_are_whole(found, tmp_path):
    found.save(tmp_path / "out")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "robustness.parquet"), found.frame)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "differences.parquet"), found.differences)
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_plain_values_for_json(found):
    plain = found.as_dict()
    assert len(plain["scores"]) == len(found.frame)
    assert plain["differences"][0]["against"] == "mola"
    assert "real, non-special tokens" in plain["protocol"]


def test_bad_input_is_refused_before_anything_is_scored(runs, tmp_path):
    def refused(paths, match, noise="embedding", strengths=None, **options):
        with pytest.raises(LamellaError, match=match), listening(lambda work: pytest.fail(work.name)):
            robustness(paths, noise, strengths, **options)

    refused([runs["lora"]], "no noise 'gaussian'", noise="gaussian")
    refused([runs["lora"]], "sigma=-0.1 is not a strength of the noise 'embedding'; it is 0 or more", strengths=[-0.1])
    refused([runs["lora"]], "p=1.5 is not a strength of the noise 'tokens'; it is from 0 to 1", "tokens", [1.5])
    refused([runs["lora"]], "0 seeds draw no noise", seeds=0)
    refused([], "No run was given")
    refused([runs["lora"], runs["lora"]], "was given twice")
    refused([runs["lora"], runs["prose-lora"]], r"lora of file:.*questions, prose-lora of file:.*prose\. Give runs of")
    refused([runs["lora"], tmp_path / "nothing"], "no folder")
    refused([runs["lora"]], "no split 'dev'", split="dev")


def test_rows_that_cannot_be_paired_are_refused(runs, bert, prose, llama, tmp_path):
    shorter = train(tiny_settings(llama, prose, "lora", max_length=4), tmp_path / "shorter").folder.path
    with pytest.raises(LamellaError, match=r"prose-lora and shorter read .* differently"):
        robustness([runs["prose-lora"], shorter], "tokens", [0.2], seeds=1)


def test_a_task_by_name_serves_runs_of_others(runs, bert, tmp_path):
    other = question_task(tmp_path / "other", train=40)
    run = train(tiny_settings(bert, other, "head", max_steps=2), tmp_path / "head").folder.path
    with pytest.raises(LamellaError, match="Scores of different tasks"):
        robustness([runs["lora"], run], "tokens", [0.2], seeds=1)
    assert robustness([runs["lora"], run], "tokens", [0.2], seeds=1, task=other).task == other


def test_strengths_are_read_from_words():
    assert strengths_of("0,0.1, 2") == (0.0, 0.1, 2.0)
    with pytest.raises(LamellaError, match="not a list of strengths"):
        strengths_of("0.1;0.2")


def test_a_folder_that_holds_something_else_is_left_alone(runs, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LamellaError, match="is a file"):
        check_folder(tmp_path / "file")
    with pytest.raises(LamellaError, match="holds a run, whose report would be overwritten"):
        check_folder(runs["lora"])
    check_folder(tmp_path / "new")


@pytest.mark.heavy
def test_minilm_loses_more_the_more_it_is_disturbed(tmp_path):
    limit = {"train": 1600, "validation": 50, "test": 50}
    lora = {"name": "lora", "lora_alpha": 16, "target_modules": "all-linear"}
    settings = tiny_settings("minilm", "trec", lora, max_steps=50, batch_size=32, lr=2e-3, limit=limit)
    run = train(settings, tmp_path / "run")
    means = robustness([run.folder.path], "embedding", [0.5, 4.0], seeds=2).means.loc["lora"]
    assert means[0.0] > 0.5
    assert means[4.0] < means[0.5] <= means[0.0] + 0.02
