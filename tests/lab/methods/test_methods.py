import pytest
from peft import PeftModel

from lamella.errors import LamellaError
from lamella.lab.data import load_backbone, load_task
from lamella.lab.methods import Mola, method_from, trainable_parameters

MOLA = {"name": "mola", "r": 4, "num_experts": "2-4"}


@pytest.fixture
def loaded(bert, questions):
    task = load_task(questions)
    return load_backbone(bert, task), task


def test_the_matched_rank_is_the_nearest(loaded, bert):
    backbone, task = loaded
    built = method_from({"name": "lora", "match": MOLA}).build(backbone, task)

    wanted = trainable_parameters(Mola.parse(MOLA).build(load_backbone(bert, task), task).model)
    assert built.decided["matched_parameters"] == wanted
    rank = built.decided["rank"]
    assert built.model.peft_config["default"].r == rank
    distances = []
    for near in (rank - 1, rank, rank + 1):
        model = method_from({"name": "lora", "r": near}).build(load_backbone(bert, task), task).model
        distances.append(abs(trainable_parameters(model) - wanted))
    assert distances[1] == min(distances)
    assert distances[1] == abs(trainable_parameters(built.model) - wanted)


def test_matching_keeps_the_scale(loaded):
    built = method_from({"name": "lora", "r": 8, "lora_alpha": 16, "match": MOLA}).build(*loaded)

    config = built.model.peft_config["default"]
    assert config.lora_alpha / config.r == 2.0


@pytest.mark.parametrize("method", ["head", "lora", MOLA, "prompt-tuning"])
def test_every_adapter_trains_the_task_head(loaded, method):
    model = method_from(method).build(*loaded).model

    assert isinstance(model, PeftModel)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("classifier" in name for name in trained)


def test_the_head_alone_is_two_tensors(loaded):
    model = method_from("head").build(*loaded).model

    assert trainable_parameters(model) == 32 * 2 + 2


def test_full_trains_everything(loaded):
    model = method_from("full").build(*loaded).model

    assert trainable_parameters(model) == sum(parameter.numel() for parameter in model.parameters())


def test_a_wrong_allocation_names_the_culprit(loaded):
    with pytest.raises(LamellaError, match="2-4-6-8"):
        method_from({"name": "mola", "num_experts": "2-4-6-8"}).build(*loaded)  # 2 layers cannot make 4 groups


def test_a_target_that_matches_nothing_is_an_error(loaded):
    with pytest.raises(ValueError, match="nowhere"):
        method_from({"name": "mola", "num_experts": 2, "target_modules": ["nowhere"]}).build(*loaded)
