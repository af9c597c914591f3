"""MoLA's routed modules as layers of experts, against the modules themselves."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from tests import tiny, tiny_moe
from torch import Tensor, nn

from lamella import LamellaError, MolaConfig, moe_layers
from lamella.backbones.moe.dispatch import Dispatch, watch_dispatch
from lamella.tracing import record_routing


def mixture(**settings: Any) -> Any:
    config = MolaConfig(
        **{"r": 2, "num_experts": 4, "top_k": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
        | settings
    )
    return get_peft_model(tiny.llama(), config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**tiny_moe.inputs()).logits


def test_a_layer_per_routed_module():
    layers = moe_layers(mixture())
    assert [(layer.index, layer.place.module) for layer in layers] == [
        (0, "self_attn.q_proj"), (0, "mlp.up_proj"), (1, "self_attn.q_proj"), (1, "mlp.up_proj"),
    ]  # fmt: skip
    assert len({layer.name for layer in layers}) == 4
    assert {(layer.num_experts, layer.top_k, len(layer.experts)) for layer in layers} == {(4, 2, 4)}


@pytest.mark.parametrize("router", ["linear", "cosine"])
@torch.no_grad()
def test_experts_recombined_by_their_router_are_the_module(router):
    model = mixture(router=router).double()
    for layer in moe_layers(model):
        x = torch.randn(3, 5, layer.module.in_features, dtype=torch.float64)
        flat = x.flatten(0, 1)
        weights = layer.router(x).dense_weights()
        y = layer.shared(flat) + sum(weights[:, e, None] * layer.experts[e](flat) for e in range(4))
        torch.testing.assert_close(y.view(3, 5, -1), layer.module(x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_dispatch_is_what_the_module_did():
    model, seen = mixture(), []
    given = tiny_moe.inputs()
    with watch_dispatch(model, moe_layers(model), seen.append), record_routing(model) as trace:
        model(**given)
    one: Dispatch
    for one in seen:
        place = one.layer.place
        assert torch.equal(one.real.view(one.shape), given["attention_mask"].bool())
        counts = torch.bincount(one.routing.indices[one.real].flatten(), minlength=4)
        assert counts.tolist() == trace.counts["default", place.stack, place.layer, place.module].tolist()
        assert torch.equal(one.layer.router(one.x).indices, one.routing.indices)
    assert len(seen) == 4


@torch.no_grad()
def test_replacing_is_as_if_the_expert_had_been_written():
    model = mixture()
    before = logits(model)
    first, *_, last = [layer for layer in moe_layers(model) if "q_proj" in layer.name]
    with last.replace(dict(enumerate(last.experts))):
        torch.testing.assert_close(logits(model), before)
    with last.replace({1: first.experts[0]}):
        with last.replace({1: first.experts[2], 3: first.experts[3]}):
            nested = logits(model)
        outer = logits(model)
    assert torch.equal(logits(model), before)
    last.experts[1].write(first.experts[0])
    torch.testing.assert_close(outer, logits(model))
    last.experts[1].write(first.experts[2])
    last.experts[3].write(first.experts[3])
    torch.testing.assert_close(nested, logits(model))
    assert not torch.allclose(nested, outer)


@torch.no_grad()
def test_masks_add_up_and_leaving_restores():
    model = mixture()
    before = logits(model)
    layer = moe_layers(model)[2]
    x = torch.randn(7, layer.module.in_features)
    z = layer.router_module.logits(x)
    z[:, [0, 3]] = -torch.inf
    with layer.mask([0]), layer.mask([3]):
        routing = layer.router(x)
        torch.testing.assert_close(routing.dense_weights(), torch.softmax(z, dim=-1))
        assert not torch.equal(logits(model), before)
        with pytest.raises(LamellaError, match="mask fewer"), layer.mask([1]):
            pass
        with record_routing(model) as trace:
            logits(model)
    assert trace.counts["default", layer.place.stack, 1, "self_attn.q_proj"][[0, 3]].tolist() == [0, 0]
    assert torch.equal(logits(model), before)


def test_experts_that_are_switched_off_or_not_routed_are_no_layers():
    model = mixture()
    with model.disable_adapter(), pytest.raises(LamellaError, match="is not a mixture of experts"):
        moe_layers(model)
    with pytest.raises(LamellaError, match="is not a mixture of experts"):
        moe_layers(mixture(num_experts=1, top_k=1))


def test_two_active_adapters_are_an_error_here_and_none_for_the_trace():
    model = mixture()
    model.add_adapter("second", MolaConfig(r=2, num_experts=3, top_k=1, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(LamellaError, match="default, second are active"):
        moe_layers(model)
    with record_routing(model) as trace:
        logits(model)
    assert set(trace.frame.adapter) == {"default", "second"}


def test_beside_a_model_s_own_experts():
    model = get_peft_model(tiny_moe.FAMILIES["mixtral"](), MolaConfig(r=2, num_experts=3, target_modules=["q_proj"]))
    layers = moe_layers(model)
    assert [(layer.index, layer.num_experts, layer.family.native) for layer in layers] == [
        (index, *kind) for index in range(3) for kind in ((3, False), (4, True))
    ]
