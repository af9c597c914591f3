import pytest
from peft import PeftModel
from tests.lab.tiny_runs import tiny_settings

from lamella.errors import LamellaError
from lamella.lab.data import load_backbone, load_task
from lamella.lab.methods import method_from
from lamella.lab.runs.evaluating import evaluate
from lamella.lab.runs.run import train


def test_nothing_but_the_lora_trains(base, questions):
    task = load_task(questions)

    model = method_from({"name": "lora-only", "r": 2}).build(load_backbone(base, task), task).model

    assert isinstance(model, PeftModel)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_a_run_of_it_is_evaluated_with_the_base_s_own_head(base, questions, run_folder):
    result = train(tiny_settings(base, questions, {"name": "lora-only", "r": 2}), run_folder)

    assert evaluate(run_folder).metrics == pytest.approx(result.metrics["test"])


def test_a_new_head_is_refused(bert, questions):
    task = load_task(questions)

    with pytest.raises(LamellaError, match="'lora-only' trains no task head"):
        method_from("lora-only").build(load_backbone(bert, task), task)
