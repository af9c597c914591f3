import json
import shutil
from pathlib import Path

import pytest
from tests.lab.tiny_runs import MOLA, tiny_settings

from lamella.errors import LamellaError
from lamella.lab.runs.evaluating import evaluate, trace
from lamella.lab.runs.run import train


@pytest.fixture(scope="module")
def run(finished_run) -> Path:
    return finished_run(MOLA).folder.path


def _other_task(folder: Path, labels: list[str]) -> str:
    folder.mkdir()
    for name in ("train", "validation", "test"):
        rows = [{"text": f"who is {name} {label} {n}", "label": label} for n in range(4) for label in labels]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{folder}"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_it_repeats_the_run(run, split):
    found = evaluate(run, split=split)

    assert found.metrics == json.loads((run / "metrics.json").read_text())[split]
    assert (found.rows, found.metric) == (16, "accuracy")


def test_an_adapter_on_its_own(run, bert, questions, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "lone")
    with pytest.raises(LamellaError, match="says nothing of its task"):
        evaluate(tmp_path / "lone")

    assert evaluate(tmp_path / "lone", questions, base=bert).metrics == evaluate(run).metrics


def test_a_whole_model(bert, finished_run):
    result = finished_run("full")
    run_folder = result.folder.path

    assert evaluate(run_folder).metrics == result.metrics["test"]
    with pytest.raises(LamellaError, match="Leave --base out"):
        evaluate(run_folder, base=bert)
    with pytest.raises(LamellaError, match="without routers"):
        trace(run_folder)


def test_a_decoder_on_prose(finished_run):
    result = finished_run(MOLA, decoder=True)
    run_folder = result.folder.path

    assert evaluate(run_folder).metrics == pytest.approx(result.metrics["test"])
    found = trace(run_folder, rows=5, shown=2)
    assert found.evaluation.rows == 5
    assert len(found.texts) == 2


SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def moved(questions, bert, tmp_path_factory):
    """The rows of each split of a run's task, and what evaluates the run with some of them changed."""
    folder = shutil.copytree(Path(questions[5:]), tmp_path_factory.mktemp("moved") / "questions")
    rows = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in SPLITS}
    copy = train(tiny_settings(bert, f"file:{folder}", "lora", max_steps=1, evaluate_every=1), folder.parent / "run")

    def change(**splits):
        for name, part in (rows | splits).items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        return evaluate(copy.folder.path)

    return rows, change


def test_rows_that_were_trained_on_are_said_and_scored_apart(moved):
    rows, change = moved
    old, new = rows["train"], rows["test"]
    assert change().trained_on == 0
    assert change().notes == ()

    found = change(train=rows["train"][4:], test=[*old[:4], *new])

    assert found.trained_on == 4
    said = " ".join(found.notes)
    assert "4 of the 20 test rows of file:" in said
    assert "were trained on, the first is row 1" in said
    assert "are not those of the run: 4 of 20 are new, the first is row 1" in said
    assert found.unseen == change().metrics
    assert found.as_dict()["trained_on"] == 4


@pytest.mark.parametrize(
    ("change", "said", "trained_on"),
    [
        ("reshuffled", "their order is another", 0),
        ("duplicated", "some stand there more or less often", 0),
        ("fewer", "2 of 16 are gone", 0),
        ("edited", "1 of 16 are new, the first is row 3; 1 of 16 are gone", 0),
        ("relabelled", "1 of 16 are new, the first is row 3", 0),
        ("of training, with another label", "were trained on, the first is row 2", 1),
        ("of training, written otherwise", "were trained on, the first is row 2", 1),
        ("of validation", "were validation rows of the run", 0),
        ("all of training", "All 16 test rows", 16),
    ],
)
def test_how_the_rows_changed_is_said(moved, change, said, trained_on):
    rows, changed = moved
    test, old = rows["test"], rows["train"]
    other = {**old[1], "label": 1 - old[1]["label"]}
    written = {**old[1], "text": f"  {old[1]['text'].upper()}"}
    tests = {
        "reshuffled": test[::-1],
        "duplicated": [*test, test[0]],
        "fewer": test[2:],
        "edited": [*test[:2], {**test[2], "text": test[2]["text"] + " here"}, *test[3:]],
        "relabelled": [*test[:2], {**test[2], "label": 1 - test[2]["label"]}, *test[3:]],
        "of training, with another label": [test[0], other, *test[2:]],
        "of training, written otherwise": [test[0], written, *test[2:]],
        "of validation": [test[0], rows["validation"][0], *test[2:]],
        "all of training": old[:16],
    }

    found = changed(train=[row for row in old if row not in tests[change]][5:], test=tests[change])

    assert said in " ".join(found.notes)
    assert found.trained_on == trained_on


def test_where_it_cannot_be_checked_it_is_said(run, bert, questions, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "lone")
    shutil.copytree(run, tmp_path / "old")
    for kept in ("rows.parquet", "digests.json"):  # which an earlier edition did not keep
        (tmp_path / "old" / kept).unlink()

    for found in (evaluate(tmp_path / "lone", questions, base=bert), evaluate(tmp_path / "old")):
        assert found.trained_on is None
        assert "whether it was trained on the test rows of file:" in found.notes[0]
        assert found.notes[0].endswith("cannot be checked.")


def test_rows_that_a_composed_lora_was_trained_on_are_said(run, bert, questions, tmp_path):
    lora, task = {"name": "lora", "r": 2, "target_modules": ["query"]}, Path(questions[5:])
    base = tmp_path / "base"
    train(tiny_settings(bert, questions, "full", max_steps=1, evaluate_every=1), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "model", base)
    part = train(tiny_settings(str(base), questions, {**lora, "name": "lora-only"}), tmp_path / "part").folder.path
    other = shutil.copytree(task, tmp_path / "other")
    shutil.copy(task / "train.jsonl", other / "test.jsonl")
    shutil.copy(task / "test.jsonl", other / "train.jsonl")
    settings = {"name": "uniform", "adapters": {"a": str(part), "b": str(part / "adapter")}}
    train(tiny_settings(str(base), f"file:{other}", settings, keep="last"), tmp_path / "composed")

    found = evaluate(tmp_path / "composed", questions, "train")

    assert found.trained_on == found.rows == 48


@pytest.mark.parametrize("labels", [["a", "b", "c"], ["a", "b"]])
def test_other_labels_are_refused(run, bert, tmp_path, labels):
    other = _other_task(tmp_path / "other", labels)
    with pytest.raises(LamellaError, match="labels differ"):
        evaluate(run, other)


def test_a_lone_adapter_refuses_another_number_of_labels(run, bert, prose, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "lone")
    with pytest.raises(LamellaError, match=r"a head with 2 output\(s\).*needs one with 3"):
        evaluate(tmp_path / "lone", _other_task(tmp_path / "other", ["a", "b", "c"]))


def test_another_kind_of_task_is_refused(run, prose):
    with pytest.raises(LamellaError, match="does not fit"):
        evaluate(run, prose)


def test_a_split_that_is_not_there(run):
    with pytest.raises(LamellaError, match="no split 'dev'"):
        evaluate(run, split="dev")


def test_every_token_of_the_shown_rows_was_routed(run):
    found = trace(run, rows=12, shown=3)

    assert (found.evaluation.rows, len(found.texts)) == (12, 3)
    assert found.num_experts == {(found.frame["stack"].iloc[0], 0): 2, (found.frame["stack"].iloc[0], 1): 4}
    for call, (_, tokens) in enumerate(found.texts):
        rows = found.tokens[found.tokens["call"] == call]
        assert rows["position"].nunique() == len(tokens)
        assert "".join(tokens).startswith("[CLS] wh")
    assert found.frame.groupby(["layer", "module"])["share"].sum().to_numpy() == pytest.approx(1)
