import pytest
import torch
from peft import get_peft_model
from tests import tiny
from torch import nn

from lamella import LamellaError, MolaConfig
from lamella.tuners.optimization import is_routed, param_groups


@pytest.fixture
def mixture():
    config = MolaConfig(r=2, num_experts=2, router="cosine", modules_to_save=["classifier"])
    return get_peft_model(tiny.bert(), config)


def test_every_trainable_parameter_is_in_one_group(mixture):
    groups = param_groups(mixture, 1e-3, router_lr=1e-4, weight_decay=0.1, router_weight_decay=0.2)

    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in mixture.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)


def test_routers_learn_at_their_own_rate(mixture):
    names = {id(parameter): name for name, parameter in mixture.named_parameters()}
    for group in param_groups(mixture, 1e-3, router_lr=1e-4, weight_decay=0.1, router_weight_decay=0.2):
        for parameter in group["params"]:
            routes = "router" in names[id(parameter)]
            assert group["lr"] == (1e-4 if routes else 1e-3)
            decays = parameter.ndim > 1
            assert group["weight_decay"] == ((0.2 if routes else 0.1) if decays else 0.0)


def test_without_a_router_rate_all_learn_alike(mixture):
    assert {group["lr"] for group in param_groups(mixture, 1e-3)} == {1e-3}


def test_any_optimizer_takes_the_groups(mixture):
    optimizer = torch.optim.SGD(param_groups(mixture, 1.0, router_lr=0.5, weight_decay=0.3))

    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "adapter": 0.3,
        "adapter-no-decay": 0.0,
        "router": 0.0,
        "router-no-decay": 0.0,
    }
    assert is_routed(mixture)
    assert not is_routed(tiny.bert())


def test_nothing_trainable_is_an_error():
    with pytest.raises(LamellaError, match="Nothing in this model is trainable"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)


def test_a_router_rate_without_router_is_an_error():
    with pytest.raises(LamellaError, match="no trainable router"):
        param_groups(nn.Linear(2, 2), 1e-3, router_lr=1e-4)
