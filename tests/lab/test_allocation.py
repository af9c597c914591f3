"""Allocations from a run and from a model, by each criterion."""

import pandas as pd
import pytest
from tests.lab.conftest import once
from tests.lab.tiny_runs import MOLA, tiny_settings

from lamella.errors import LamellaError
from lamella.lab import allocation
from lamella.lab.allocation import allocate_from
from lamella.lab.data import load_task
from lamella.lab.runs.run import train
from lamella.lab.runs.trained import load_trained
from lamella.lab.scoring import score
from lamella.progress import listening


@pytest.mark.parametrize("criterion", ["redundancy", "contribution"])
def test_of_a_run_the_budget_is_its_own(finished_run, criterion):
    run = finished_run(MOLA).folder.path  # 2 and 4 experts
    told = []
    with listening(lambda work: told.append(str(work))):
        found = allocate_from(str(run), criterion, rows=8)
    assert found.criterion == criterion
    assert sum(found.experts) == 6
    assert sum(allocate_from(str(run), criterion, rows=8, budget=5).experts) == 10
    if criterion == "redundancy":
        kept = pd.read_parquet(run / "redundancy.parquet").groupby("layer")["normalised"].mean()
        assert list(found.needs) == pytest.approx(kept.tolist())
    else:
        assert told[-1].startswith("the loss without each expert: 6 of 6 experts, ")


def test_of_several_tasks_each_row_s_own_head_is_scored(bert, questions, pairs, tmp_path_factory, monkeypatch):
    settings = tiny_settings(bert, f"joint:{questions}+{pairs}", MOLA)
    run = once(tmp_path_factory, "run-together", lambda folder: train(settings, folder))
    losses = []
    monkeypatch.setattr(allocation, "contribution", lambda _, loss: losses.append(loss()) or {"": [1.0, 2.0]})
    assert allocate_from(str(run), "contribution", rows=8).experts == (2, 4)
    trained = load_trained(run)
    rows, encoded = trained.rows("validation", 8)
    assert losses == pytest.approx([score(trained.model, trained.task, rows, encoded.collator, 8).metrics["loss"]])


def test_of_a_model_its_weights_or_what_it_makes_of_tasks(bert, questions, prose):
    weights = allocate_from(bert)
    assert (weights.criterion, sum(weights.experts)) == ("heavy-tails", 10)
    texts = [load_task(questions), load_task(prose)]
    tasks = allocate_from(bert, texts=texts, budget=3, rows=4)
    assert (tasks.criterion, sum(tasks.experts)) == ("diversity", 6)
    assert tasks.needs != allocate_from(bert, texts=texts[:1], rows=4).needs  # one task's documents


def test_what_does_not_go_together_is_said(bert, questions, finished_run):
    run = str(finished_run(MOLA).folder.path)
    with pytest.raises(
        LamellaError, match=r"criteria of a trained run, as .* is, are redundancy and contribution, not"
    ):
        allocate_from(run, "heavy-tails")
    with pytest.raises(
        LamellaError, match=r"criteria of a model, as .* is, are diversity and heavy-tails, not 'chance'"
    ):
        allocate_from(bert, "chance")
    with pytest.raises(LamellaError, match="reads no text"):
        allocate_from(bert, "heavy-tails", texts=[load_task(questions)])
    with pytest.raises(LamellaError, match="reads texts"):
        allocate_from(bert, "diversity")
    with pytest.raises(LamellaError, match="no trained LoRA experts"):
        allocate_from(str(finished_run("lora").folder.path))
