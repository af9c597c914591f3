import json
import shutil
from pathlib import Path

import pytest
from tests.lab.tiny_runs import tiny_settings

from lamella.errors import LamellaError
from lamella.lab.runs.evaluating import evaluate, trace
from lamella.lab.runs.run import train

MOLA = {"name": "mola", "r": 2, "num_experts": [2, 3], "top_k": 2}


@pytest.fixture(scope="module")
def run(bert, questions, tmp_path_factory) -> Path:
    return train(tiny_settings(bert, questions, MOLA), tmp_path_factory.mktemp("evaluate") / "run").folder.path


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


def test_a_whole_model(bert, questions, run_folder):
    result = train(tiny_settings(bert, questions, "full"), run_folder)

    assert evaluate(run_folder).metrics == result.metrics["test"]
    with pytest.raises(LamellaError, match="Leave --base out"):
        evaluate(run_folder, base=bert)
    with pytest.raises(LamellaError, match="without routers"):
        trace(run_folder)


def test_a_decoder_on_prose(llama, prose, run_folder):
    result = train(tiny_settings(llama, prose, MOLA), run_folder)

    assert evaluate(run_folder).metrics == pytest.approx(result.metrics["test"])
    found = trace(run_folder, rows=5, shown=2)
    assert found.evaluation.rows == 5
    assert len(found.texts) == 2


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
    assert found.num_experts == {(found.frame["stack"].iloc[0], 0): 2, (found.frame["stack"].iloc[0], 1): 3}
    for call, (_, tokens) in enumerate(found.texts):
        rows = found.tokens[found.tokens["call"] == call]
        assert rows["position"].nunique() == len(tokens)
        assert "".join(tokens).startswith("[CLS] wh")
    assert found.frame.groupby(["layer", "module"])["share"].sum().to_numpy() == pytest.approx(1)
