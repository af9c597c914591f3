"""Every family's experts, routers and shared parts against the model's own layers, which lamella did not write."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import tiny, tiny_moe
from torch import Tensor, nn

from lamella import LamellaError
from lamella.backbones.moe import MoELayer, moe_layers
from lamella.backbones.moe.dispatch import Dispatch, watch_dispatch

FAMILIES = sorted(tiny_moe.FAMILIES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def dispatches(model: Any, given: dict[str, Tensor]) -> list[Dispatch]:
    seen: list[Dispatch] = []
    with torch.no_grad(), watch_dispatch(model, moe_layers(model), seen.append):
        model(**given)
    return seen


def own_output(layer: MoELayer, x: Tensor) -> Tensor:
    """What the model's module makes of ``x (batch, tokens, h)``."""
    output = layer.module(x)
    return output[0] if isinstance(output, tuple) else output


def recombined(layer: MoELayer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    weights = layer.router(x).dense_weights().to(x.dtype)  # (N, E)
    y = sum(weights[:, e, None] * layer.experts[e](flat) for e in range(layer.num_experts))
    if layer.shared is not None:
        y = y + layer.shared(flat)
    return y.view(x.shape)


@every_family
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_experts_recombined_by_their_router_are_the_layer(family, dtype, atol):
    model = tiny_moe.FAMILIES[family](dtype=dtype)
    for layer in moe_layers(model):
        x = torch.randn(3, 7, tiny_moe.HIDDEN, dtype=dtype)
        expected = own_output(layer, x)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(recombined(layer, x), expected, rtol=0, atol=atol)


@every_family
@torch.no_grad()
def test_with_experts_run_eagerly_too(family):
    model = tiny_moe.FAMILIES[family](experts_implementation="eager")
    for layer in moe_layers(model):
        x = torch.randn(2, 5, tiny_moe.HIDDEN)
        torch.testing.assert_close(recombined(layer, x), own_output(layer, x))


@every_family
def test_layers_are_counted_through_the_stacks(family):
    layers = moe_layers(tiny_moe.FAMILIES[family]())
    expected = {"switch_transformers": [1, 3, 5], "deepseek_v2": [1, 2], "deepseek_v3": [1, 2]}.get(family, [0, 1, 2])
    assert [layer.index for layer in layers] == expected
    for layer in layers:
        assert layer.module in list(layer.block.modules())
        assert len(layer.experts) == layer.num_experts == (6 if "deepseek" in family else 4)
        assert layer.top_k == {"switch_transformers": 1, "deepseek_v2": 3, "deepseek_v3": 3}.get(family, 2)
        assert len(layer.experts[1:3]) == 2
        with pytest.raises(IndexError):
            layer.experts[layer.num_experts]
    if family == "switch_transformers":
        assert [layer.place.stack for layer in layers] == ["encoder.block", "encoder.block", "decoder.block"]


@every_family
def test_the_model_may_be_on_the_meta_device(family):
    with torch.device("meta"):
        model = tiny_moe.build(family)
    real = moe_layers(tiny_moe.FAMILIES[family]())
    for layer, same in zip(moe_layers(model), real, strict=True):
        assert (layer.index, layer.num_experts, layer.top_k) == (same.index, same.num_experts, same.top_k)
        assert layer.experts[1].parameters == same.experts[1].parameters
        assert layer.experts[1].up.is_meta


@every_family
def test_experts_together_hold_the_parameters_of_their_module(family):
    for layer in moe_layers(tiny_moe.FAMILIES[family]()):
        own = sum(parameter.numel() for parameter in layer.experts_module.parameters())
        assert sum(expert.parameters for expert in layer.experts) == own


@every_family
def test_writing_an_expert_changes_that_expert_and_no_other(family):
    model = tiny_moe.FAMILIES[family]()
    first, *_, last = moe_layers(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = [{name: m.clone() for name, m in expert.matrices.items()} for expert in last.experts]
    last.experts[2].write(first.experts[1])
    for e, expert in enumerate(last.experts):
        wanted = first.experts[1].matrices if e == 2 else kept[e]
        assert all(torch.equal(matrix, wanted[name]) for name, matrix in expert.matrices.items())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith(f"{last.name}.experts") for name in changed)


def test_an_expert_of_another_shape_is_refused():
    mine = moe_layers(tiny_moe.FAMILIES["mixtral"]())[0].experts[0]
    with pytest.raises(LamellaError, match="cannot be written over"):
        mine.write(moe_layers(tiny_moe.FAMILIES["switch_transformers"]())[0].experts[0])


@every_family
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_dispatch_is_what_the_layer_did(family, padding):
    model = tiny_moe.FAMILIES[family](dtype=torch.float64)
    given = tiny_moe.inputs_for(model, padding=padding)
    outputs: dict[str, Tensor] = {}
    for layer in moe_layers(model):
        layer.module.register_forward_hook(lambda _, __, output, name=layer.name: outputs.update({name: output}))
    for seen in dispatches(model, given):
        layer, routing = seen.layer, seen.routing
        weights = routing.dense_weights().double()
        y = sum(weights[:, e, None] * layer.experts[e](seen.x) for e in range(layer.num_experts))
        y = y if layer.shared is None else y + layer.shared(seen.x)
        output = outputs[layer.name]
        own = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(y.view(own.shape), own, rtol=0, atol=1e-12)
        assert seen.shape == tuple(own.shape[:2])
        mask = given["labels"].ne(-100) if layer.place.stack == "decoder.block" else given["attention_mask"].bool()
        assert torch.equal(seen.real.view(seen.shape), mask)
        assert torch.allclose(routing.probs.sum(dim=-1), torch.ones(()).to(routing.probs))


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers", "phimoe"])
def test_in_training_a_dispatch_has_the_model_s_jitter_and_sampling(family):
    """Each of the three draws noise anew in every forward, on another place."""
    noise = {"router_jitter_noise": 0.3} | ({"input_jitter_noise": 0.3} if family == "phimoe" else {})
    model = tiny_moe.build(family, **noise).train()
    outputs: dict[str, Tensor] = {}
    for layer in moe_layers(model):
        layer.module.register_forward_hook(lambda _, __, output, name=layer.name: outputs.update({name: output}))
    first, second = (dispatches(model, tiny_moe.inputs_for(model)) for _ in range(2))
    for seen in second:
        weights = seen.routing.dense_weights()
        y = sum(weights[:, e, None] * seen.layer.experts[e](seen.x) for e in range(seen.layer.num_experts))
        torch.testing.assert_close(y.view(outputs[seen.layer.name].shape), outputs[seen.layer.name])
    assert not torch.equal(first[0].routing.logits, second[0].routing.logits)


@every_family
def test_dispatches_of_a_model_without_a_head(family):
    """Its list of blocks lies in the model itself, which then is the one that is given the mask."""
    model = tiny_moe.FAMILIES[family]().get_decoder()
    ids, mask = tiny_moe.inputs()["input_ids"], tiny_moe.inputs()["attention_mask"]
    seen = dispatches(model, {"input_ids": ids, "attention_mask": mask})
    assert seen
    assert all(torch.equal(one.real.view(one.shape), mask.bool()) for one in seen)


def test_experts_under_an_adapter_are_not_their_parameters_alone():
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    layer = moe_layers(get_peft_model(tiny_moe.FAMILIES["mixtral"](), config))[0]
    assert len(layer.experts) == 4
    with pytest.raises(LamellaError, match="wrapped by a PEFT adapter"):
        layer.experts[0]


def test_a_router_called_by_hand_is_not_watched():
    model = tiny_moe.FAMILIES["mixtral"]()
    seen: list[Dispatch] = []
    layer = moe_layers(model)[0]
    with watch_dispatch(model, [layer], seen.append):
        layer.router(torch.randn(5, tiny_moe.HIDDEN))
    assert seen == []


@torch.no_grad()
def test_switch_says_which_tokens_had_no_room():
    model = tiny_moe.FAMILIES["switch_transformers"]()
    layer = moe_layers(model)[0]
    # one expert for all, and it has room for two tokens of each row
    x = 9 * layer.router_module.classifier.weight[3].repeat(2, 5, 1)
    routing = layer.router(x)
    assert routing.logits.argmax(dim=-1).tolist() == [3] * 10
    assert routing.indices.flatten().tolist() == [3] * 10
    assert routing.kept.flatten().tolist() == [True, True, False, False, False] * 2
    assert routing.weights.flatten()[routing.kept.flatten()].min() > 0
    assert routing.weights.flatten()[~routing.kept.flatten()].tolist() == [0] * 6
    assert own_output(layer, x)[:, 2:].abs().max() == 0


def test_tokens_of_one_modality_are_refused():
    """Ernie 4.5 VL gives its text experts the states of the text tokens, flattened, where there are images too."""
    layer = moe_layers(tiny_moe.FAMILIES["mixtral"]())[0]
    with layer.family.watched(layer.module, lambda *_: None), pytest.raises(LamellaError, match="of one modality"):
        layer.module(torch.zeros(3 * tiny_moe.HIDDEN))


class Unknown(nn.Module):
    """Blocks with a router and stacked experts that nobody told lamella of."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"model_type": "strange_moe"})()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": _Stacked(), "lin": nn.Linear(4, 4)}) for _ in range(3))


class _Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(6, 4, 8))


def test_an_unknown_mixture_is_told_which_file_to_write_and_what_was_found():
    with pytest.raises(
        LamellaError, match=r"backbones/moe/strange_moe\.py.*3 x _Stacked \(w1 \(6, 4, 8\)\) in ModuleDict"
    ):
        moe_layers(Unknown())


def test_a_dense_model_is_no_mixture():
    with pytest.raises(LamellaError, match="is not a mixture of experts"):
        moe_layers(tiny.llama())
