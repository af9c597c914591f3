import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.lab.conftest import once
from tests.lab.tiny_runs import MOLA, tiny_settings

from lamella.errors import LamellaError
from lamella.lab.data import encode, load_backbone, load_task
from lamella.lab.methods.compositions import Target
from lamella.lab.methods.searched import scores_on_training_rows
from lamella.lab.pages import run_report
from lamella.lab.report.report import render
from lamella.lab.runs.by_task import BY_TASK, differences
from lamella.lab.runs.checks import diagnose
from lamella.lab.runs.evaluating import evaluate, trace
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.rows import Rows
from lamella.lab.runs.run import RunResult, train
from lamella.lab.runs.settings import RunSettings, resolve, settings_of
from lamella.lab.runs.tasks import limited
from lamella.lab.runs.trained import load_trained
from lamella.lab.runs.trainer import BatchOrder, task_draws
from lamella.lab.scoring import metrics_of, own_logits


@pytest.fixture(scope="session")
def together(questions, pairs):
    return f"joint:{questions}+{pairs}"


@pytest.fixture(scope="session")
def run(bert, together, tmp_path_factory):
    settings = tiny_settings(bert, together, MOLA)
    made = RunFolder(once(tmp_path_factory, "run-together", lambda folder: train(settings, folder)))
    return RunResult(made, made.metrics(), load_trained(made.path).model)


def test_a_list_of_tasks_is_one_name_and_one_task_is_itself(questions, pairs):
    settings = RunSettings.parse({"tasks": [questions, pairs]})

    assert settings.task == f"joint:{questions}+{pairs}"
    assert RunSettings.parse({"tasks": [questions]}).task == questions
    assert resolve(None, ["tasks=[a, b]"], task="c").task == "joint:a+b"
    with pytest.raises(LamellaError, match="Give one of them"):
        RunSettings.parse({"tasks": ["a", "b"], "task": "c"})


def test_labels_and_rows_of_the_parts_lie_one_behind_the_other(together, questions, pairs, bert):
    task = load_task(together)
    encoded = encode(task, load_backbone(bert, task).tokenizer, max_length=32)

    assert task.kind == "classification"
    assert task.heads == (0, 0, 1, 1, 1)
    assert [part.name for part in task.tasks] == [questions, pairs]
    assert len(encoded.train) == sum(len(part.splits["train"]) for part in task.parts)
    by_task = {name: set() for name in (questions, pairs)}
    for name, label in zip(encoded.train["task"], encoded.train["labels"], strict=True):
        by_task[name].add(label)
    assert by_task == {questions: {0, 1}, pairs: {2, 3, 4}}


def test_rows_that_another_task_evaluates_on_are_not_trained_on(tmp_path, questions):
    folder = Path(questions.removeprefix("file:"))
    (tmp_path / "other").mkdir()
    for name, source in (("train", "test"), ("validation", "validation"), ("test", "train")):
        rows = [json.loads(line) for line in (folder / f"{source}.jsonl").read_text().splitlines()]
        kept = rows[:4] + [{"text": "we are here now", "label": 0}] * (name == "train")
        (tmp_path / "other" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))

    task = load_task(f"joint:{questions}+file:{tmp_path / 'other'}")

    assert task.parts[1].splits["train"]["text"] == ["we are here now"]
    assert len(task.parts[0].splits["train"]) == 44
    assert any("because another of the tasks tests on them" in note for note in task.notes)


def test_each_row_is_scored_by_its_own_head():
    logits, labels = torch.tensor([[1.0, 2, 9, 9, 9], [9, 9, 1, 3, 2]]), torch.tensor([0, 4])

    own = own_logits(logits, labels, (0, 0, 1, 1, 1))

    assert own.argmax(-1).tolist() == [1, 3]
    expected = [torch.nn.functional.cross_entropy(logits[0, :2], labels[0]),
                torch.nn.functional.cross_entropy(logits[1, 2:], labels[1] - 2)]  # fmt: skip
    found = torch.nn.functional.cross_entropy(own, labels, reduction="none")
    assert torch.allclose(found, torch.stack(expected))


def test_the_score_is_the_mean_over_tasks(run, together, questions, pairs):
    task, said = load_task(together), run.metrics["test"]

    assert said["accuracy"] == pytest.approx((said[f"{questions}/accuracy"] + said[f"{pairs}/accuracy"]) / 2)
    saved = run.folder.table("predictions.parquet", "split", "task")
    test = saved[saved["split"] == "test"]
    assert metrics_of(task, {name: test[name].to_numpy() for name in test if name != "split"}) == pytest.approx(said)
    assert test.groupby("task", sort=False).size().to_dict() == {questions: 16, pairs: 12}
    assert {"prediction", "correct"} <= set(test)
    assert test.loc[test["task"] == pairs, "prediction"].between(2, 4).all()


def test_the_doctor_finds_the_run_as_it_says_it_is(run):
    diagnosis = diagnose(run)

    assert [one.code for one in diagnosis.findings if one.severity == "error"] == []
    assert any("computed again from 28 predictions" in line for line in diagnosis.checked)
    assert any("predicted again" in line for line in diagnosis.checked)


def test_a_run_is_evaluated_on_all_its_tasks_or_on_one(run, questions, pairs):
    whole, one = evaluate(run.folder.path), evaluate(run.folder.path, pairs)

    assert whole.metrics == pytest.approx(run.metrics["test"])
    assert [(row["task"], row["rows"]) for row in whole.by_task] == [(questions, 16), (pairs, 12)]
    low, high = whole.by_task[1]["interval"]
    assert low <= whole.by_task[1]["value"] <= high
    assert (one.task, one.rows) == (pairs, 12)
    assert not any("are not those of the run" in note for note in one.notes)
    assert one.metrics["accuracy"] == run.metrics["test"][f"{pairs}/accuracy"]
    assert whole.trained_on == 0


def test_a_task_of_other_labels_is_refused(run, prose):
    with pytest.raises(LamellaError, match="head does not fit"):
        evaluate(run.folder.path, prose)


def test_routing_is_traced_by_task(run, questions, pairs):
    by_task, whole = run.folder.table(BY_TASK), run.folder.table("trace.parquet")
    tokens = by_task.groupby("task")["tokens"].first()

    assert set(tokens.index) == {questions, pairs}
    assert tokens.sum() == whole["tokens"].iloc[0]
    traced = trace(run.folder.path, rows=8, shown=2)
    assert set(traced.by_task["task"]) == {questions, pairs}
    assert traced.evaluation.rows == 8


def test_differences_between_tasks():
    import pandas as pd

    def use(task, weights):
        return [{"task": task, "stack": "s", "layer": 0, "module": "m", "expert": at, "mean_weight": one}
                for at, one in enumerate(weights)]  # fmt: skip

    frame = pd.DataFrame([*use("a", (1.0, 0.0)), *use("b", (0.0, 1.0)), *use("c", (0.25, 0.25))])

    apart = differences(frame).set_index(["task", "other"])["difference"]
    assert apart.to_dict() == {("a", "b"): 1.0, ("a", "c"): 0.5, ("b", "c"): 0.5}


def test_the_report_shows_scores_and_routing_by_task(run, pairs):
    page = render(run_report(run, settings_of(run.folder.path)))

    assert "Routing by task" in page
    assert "Tasks are routed most differently in layer" in page
    assert pairs in page


def test_draws_follow_the_temperature():
    assert task_draws([900, 100], 1.0) == [900, 100]
    assert task_draws([900, 100], 2.0) == [750, 250]
    assert sum(task_draws([7, 5, 3], 1.7)) == 15
    low, high = task_draws([900, 100], 1e6)
    assert abs(low - high) <= 1


def test_small_tasks_are_drawn_again_only_when_all_their_rows_were():
    epochs = [list(BatchOrder([90, 10], 4, 0, lambda at=at: at, None, 2.0)) for at in range(3)]

    small = [row for epoch in epochs for row in epoch if row >= 90]
    assert [len(epoch) for epoch in epochs] == [100] * 3
    assert len(small) == 75
    assert max(np.bincount(small)[90:]) - min(np.bincount(small)[90:]) <= 1
    assert epochs[0] != epochs[1]


def test_digests_are_of_all_parts_and_limits_of_each(together):
    task = load_task(together)
    rows, few = Rows.of(task), limited(task, {"train": 5})

    assert len(rows.whole["train"]) == len(task.splits["train"])
    assert [len(part.splits["train"]) for part in few.parts] == [5, 5]
    assert len(few.splits["train"]) == 10
    assert len(few.splits["test"]) == 28


def test_a_killed_run_goes_on_to_the_same_end(bert, together, tmp_path):
    settings = tiny_settings(bert, together, "head", max_steps=4, evaluate_every=2, task_temperature=3.0, limit=16)

    class KilledError(Exception):
        pass

    from transformers import TrainerCallback

    class Killing(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KilledError

    with pytest.raises(KilledError):
        train(settings, tmp_path / "killed", callbacks=[Killing()])
    again, whole = train(settings, tmp_path / "killed"), train(settings, tmp_path / "whole")

    assert again.metrics["test"] == whole.metrics["test"]


def test_a_classification_becomes_a_question_for_a_decoder(llama, questions, pairs, tmp_path):
    name = f"joint:text:{questions}+text:{pairs}"
    task = load_task(name)

    assert task.kind == "multiple-choice"
    assert task.parts[1].splits["train"][0]["question"].endswith("\nWhich of these is it: 0, 1, 2?")
    settings = tiny_settings(llama, name, "lora", max_steps=2, evaluate_every=2, max_length=64, limit=4)
    found = train(settings, tmp_path / "run").metrics["test"]
    assert found["accuracy"] == np.mean([found[f"text:{questions}/accuracy"], found[f"text:{pairs}/accuracy"]])


def test_a_composition_is_fitted_to_the_tasks_that_a_stage_learns(bert, questions, pairs):
    task = load_task(f"learn:1:{questions}+{pairs}")
    backbone = load_backbone(bert, task)

    found = scores_on_training_rows(Target(backbone, task), 32, 8)(backbone.model)

    assert f"{questions}/accuracy" in found
    assert f"{pairs}/accuracy" not in found


def test_what_one_model_cannot_learn_is_refused(questions, pairs, prose):
    with pytest.raises(LamellaError, match="classifications and classifications of pairs"):
        load_task(f"joint:{questions}+{prose}")
    with pytest.raises(LamellaError, match="each of them once"):
        load_task(f"joint:{questions}+{questions}")
    with pytest.raises(LamellaError, match=r"Write joint:text:TASK\+text:TASK"):
        load_task(f"text:learn:1:{questions}+{pairs}")
