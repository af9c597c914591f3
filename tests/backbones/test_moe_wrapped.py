"""Models whose experts lie elsewhere, are quantised, compiled, or under an adapter: right, or refused by name."""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from tests import tiny_moe
from tests.similarity.compression.test_serving import names, random_damages
from transformers.integrations.finegrained_fp8 import FP8Experts

from lamella import LamellaError, moe_layers, record_routing
from lamella.similarity import align, capture, compress, reroute, screen, swap
from lamella.similarity.activations import model_fingerprint

FAMILIES = ("qwen2_moe", "gpt_oss", "switch_transformers")


def offloaded(family):
    model = tiny_moe.FAMILIES[family]()
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_offloaded_experts_are_brought_in(family):
    whole, model = moe_layers(tiny_moe.FAMILIES[family]()), moe_layers(offloaded(family))
    x = torch.randn(2, 3, tiny_moe.HIDDEN)
    for one, other in zip(whole, model, strict=True):
        assert torch.equal(other.experts[1](x), one.experts[1](x))
        assert torch.equal(other.router(x).weights, one.router(x).weights)
        with pytest.raises(LamellaError, match="offloaded by accelerate"):
            other.experts[0].write(one.experts[1])


def test_an_offloaded_model_is_captured_screened_and_aligned_as_a_whole_one(tmp_path):
    models = tiny_moe.FAMILIES["mixtral"](), offloaded("mixtral")
    given = [tiny_moe.inputs(batch=4, tokens=12, seed=seed) for seed in range(4)]
    captures = [capture(model, given, tmp_path / str(at)) for at, model in enumerate(models)]
    assert captures[0].manifest == captures[1].manifest
    pairs = [((0, 1), (2, 3)), ((2, 3), (0, 1))]
    steps = [lambda c, m: screen(c, m, pairs), lambda c, m: align(c, m, pairs, steps=3)]
    for step in steps:
        whole, other = (step(*one) for one in zip(captures, models, strict=True))
        assert whole.equals(other)


def test_an_offloaded_model_is_not_swapped_or_compressed():
    model = offloaded("mixtral")
    for unit in ("expert", "router", "router+experts", "block"):
        with pytest.raises(LamellaError, match="offloaded by accelerate"), swap(model, (0, 1), (1, 2), unit):
            pass
    with pytest.raises(LamellaError, match="offloaded by accelerate"):
        compress(model, None, 0.5, scope="layer")


def test_quantised_experts_are_refused_where_their_numbers_would_be_used(tmp_path):
    model = tiny_moe.FAMILIES["mixtral"]()
    for layer in moe_layers(model):
        layer.module.experts = FP8Experts(model.config, block_size=(8, 8))
    layer = moe_layers(model)[0]
    assert len(layer.experts) == tiny_moe.EXPERTS
    for use in (
        lambda: layer.experts[0],
        lambda: capture(model, [], tmp_path),
        lambda: swap(model, (0, 1), (1, 2)).__enter__(),
        lambda: compress(model, None, 0.5, scope="layer"),
    ):
        with pytest.raises(LamellaError, match=r"quantised \(gate_up_proj is torch.float8"):
            use()


def test_a_model_inside_a_compiled_one_is_the_same_model():
    model = tiny_moe.FAMILIES["mixtral"]()
    compiled = torch.compile(model, backend="eager")
    assert [layer.place for layer in moe_layers(compiled)] == [layer.place for layer in moe_layers(model)]
    assert compiled.get_submodule(moe_layers(compiled)[0].name) is moe_layers(model)[0].module
    assert model_fingerprint(compiled) == model_fingerprint(model)


@pytest.mark.heavy
@torch.no_grad()
def test_a_compiled_model_is_traced_and_changed():
    model = tiny_moe.build("mixtral", num_hidden_layers=1)
    layer = moe_layers(model)[0]
    given = tiny_moe.inputs()
    model.compile(backend="eager")
    plain = model(**given).logits
    with record_routing(model) as trace:
        model(**given)
    assert [int(counts.sum()) for counts in trace.counts.values()] == [2 * int(given["attention_mask"].sum())]
    limited = reroute(model, names(model), what="limited", limit=2, damage=random_damages(model))
    for change in (layer.mask([0]), layer.replace({0: torch.zeros_like}), swap(model, (0, 0), (0, 1)), limited):
        with change:
            assert not torch.equal(model(**given).logits, plain)
        assert torch.equal(model(**given).logits, plain)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "granitemoe"])
def test_a_router_under_a_lora_is_read_with_it(family):
    name = "router" if family == "granitemoe" else "gate"
    config = LoraConfig(target_modules=["o_proj"], target_parameters=[f"{name}.weight"], init_lora_weights=False)
    model = get_peft_model(tiny_moe.FAMILIES[family](), config).eval()
    layer = moe_layers(model)[-1]
    x = torch.randn(5, tiny_moe.HIDDEN)
    with torch.no_grad(), record_routing(model) as trace:
        model(**tiny_moe.inputs())
    assert layer.top_k == {"deepseek_v3": 3}.get(family, 2)
    adapted = layer.router(x).logits
    with model.disable_adapter():
        assert not torch.equal(layer.router(x).logits, adapted)
    with layer.mask([1]):
        assert 1 not in layer.router(x).indices
    assert all(
        counts.sum() == layer.top_k * tiny_moe.inputs()["attention_mask"].sum() for counts in trace.counts.values()
    )
