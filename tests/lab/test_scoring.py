import json

import numpy as np
import pytest
import torch

from lamella.errors import LamellaError
from lamella.lab.data import encode, load_backbone, load_task
from lamella.lab.runs.tasks import limited
from lamella.lab.scoring import metrics_of, score


def write(folder, rows):
    folder.mkdir()
    for name in ("train", "validation", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return f"file:{folder}"


def scored(model_path, task_name, batch_size=5, split="test"):
    task = load_task(task_name)
    torch.manual_seed(0)
    backbone = load_backbone(model_path, task)
    encoded = encode(task, backbone.tokenizer, decoder=backbone.decoder)
    return task, backbone, score(backbone.model, task, getattr(encoded, split), encoded.collator, batch_size)


@pytest.mark.parametrize(("model", "task"), [("bert", "questions"), ("llama", "prose")])
def test_batches_do_not_change_the_scores_or_their_order(request, model, task):
    model, task = request.getfixturevalue(model), request.getfixturevalue(task)
    *_, whole = scored(model, task, batch_size=64)
    *_, alone = scored(model, task, batch_size=1)

    for name in whole.columns:
        np.testing.assert_allclose(whole.columns[name], alone.columns[name], rtol=1e-4, atol=1e-4)


def test_a_decoder_pays_for_every_token_after_the_first(llama, prose):
    task, backbone, scores = scored(llama, prose)

    for index, text in enumerate(task.splits["test"]["text"]):
        ids = backbone.tokenizer(text)["input_ids"]
        inputs = torch.tensor([ids if ids[-1] == 3 else [*ids, 3]])
        with torch.no_grad():
            mean = backbone.model(input_ids=inputs, labels=inputs).loss.item()
        assert scores.columns["tokens"][index] == inputs.shape[1] - 1
        assert scores.columns["nll"][index] == pytest.approx(mean * (inputs.shape[1] - 1), rel=1e-4)


def test_a_decoder_answers_with_the_likeliest_option(llama, tmp_path):
    rows = [
        {"question": f"who is {word}", "choices": ["she now", "we are here", "it"], "label": index % 3}
        for index, word in enumerate(["she", "they", "it", "we", "going", "now", "then", "here", "are"])
    ]
    name = write(tmp_path / "choices", {"train": rows[:3], "validation": rows[3:6], "test": rows[6:]})
    task, backbone, scores = scored(llama, name)
    encoded = encode(task, backbone.tokenizer, decoder=True)
    for index in range(len(task.splits["test"])):
        losses = {}
        for option in encoded.test.filter(lambda one, index=index: one["row"] == index):
            inputs = {name: torch.tensor([option[name]]) for name in ("input_ids", "labels")}
            with torch.no_grad():
                losses[option["choice"]] = backbone.model(**inputs).loss.item()
        assert scores.columns["prediction"][index] == min(losses, key=losses.get)
        assert scores.columns["label"][index] == task.splits["test"]["label"][index]
    assert len(scores.columns["prediction"]) == len(task.splits["test"])
    assert scores.metrics["accuracy"] == scores.columns["correct"].mean()


def test_regression_scores_its_numbers(bert, tmp_path):
    rows = [{"text1": f"who is {word}", "label": 0.5 * index} for index, word in enumerate(["she", "they", "it", "we"])]
    others = [{"text1": f"where is {word}", "label": 0.25 * index} for index, word in enumerate(["she", "they", "we"])]
    held_out = [{"text1": "where is it", "label": 1.0}]
    name = write(tmp_path / "numbers", {"train": rows, "validation": held_out, "test": others})
    task, _, scores = scored(bert, name)

    assert task.kind == "regression"
    error = (scores.columns["prediction"] - scores.columns["label"]) ** 2
    np.testing.assert_allclose(scores.columns["squared_error"], error, rtol=1e-5)
    assert -1.0 <= scores.metrics["pearson"] <= 1.0


def test_the_mode_of_the_model_is_left_as_it_was(bert, questions):
    task = load_task(questions)
    backbone = load_backbone(bert, task)
    encoded = encode(task, backbone.tokenizer)
    backbone.model.train()

    score(backbone.model, task, encoded.test, encoded.collator, 8)

    assert backbone.model.training


def test_outputs_that_are_no_numbers_are_an_error(bert, questions):
    task = load_task(questions)
    backbone = load_backbone(bert, task)
    encoded = encode(task, backbone.tokenizer)
    with torch.no_grad():
        backbone.model.classifier.weight.fill_(torch.nan)

    with pytest.raises(LamellaError, match="not finite"):
        score(backbone.model, task, encoded.test, encoded.collator, 8)


def test_a_score_of_no_rows_is_refused(bert, questions):
    task, backbone, scores = scored(bert, questions)
    encoded = encode(task, backbone.tokenizer)

    with pytest.raises(LamellaError, match="has no row to score"):
        score(backbone.model, task, encoded.test.select([]), encoded.collator, 8)
    with pytest.raises(LamellaError, match="a metric of none says nothing"):
        metrics_of(task, {name: column[:0] for name, column in scores.columns.items()})


def test_limits_take_the_same_rows_every_time(questions):
    task = load_task(questions)

    small = limited(task, {"train": 5})

    assert len(small.splits["train"]) == 5
    assert len(small.splits["test"]) == len(task.splits["test"])
    assert small.splits["train"]["text"] == limited(task, {"train": 5}).splits["train"]["text"]
    assert len(limited(task, 3).splits["test"]) == 3
