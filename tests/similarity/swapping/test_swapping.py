import copy
from contextlib import ExitStack, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tests import tiny
from tests.pairwise import pairwise
from tests.reference.similarity_swap import swapped_model
from tests.tiny_moe import FAMILIES, PATHS, build, inputs_for
from torch import nn

from lamella import MolaConfig
from lamella.backbones.moe import moe_layers, watch_dispatch
from lamella.errors import LamellaError
from lamella.similarity.swapping import expert_pairs, layer_pairs, randomised, swap
from lamella.similarity.swapping.exchange import exchanged_numbers, exchanged_storages, overwritten

UNITS = ("expert", "router", "router+experts", "block")


def logits(model):
    with torch.no_grad():
        return model(**inputs_for(model, padding="right")).logits


def state(model):
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same_state(model, before) -> bool:
    now = dict([*model.named_parameters(), *model.named_buffers()])
    return all(torch.equal(now[name], tensor) for name, tensor in before.items())


def two_layers(model, unit):
    """The last two layers that can be swapped."""
    return layer_pairs(model, "router" if unit == "expert" else unit)[-1]


def two_of(model, unit):
    """Two layers, or the expert of each that is chosen most."""
    pair = two_layers(model, unit)
    return tuple((layer, busiest(model, layer)) for layer in pair) if unit == "expert" else pair


def busiest(model, layer):
    chosen = []
    layers = [one for one in moe_layers(model) if one.index == layer]
    with watch_dispatch(model, layers, lambda dispatch: chosen.append(dispatch.routing.indices[dispatch.real])):
        logits(model)
    return torch.cat(chosen).flatten().mode().values.item()


def switch_with_deep_decoder(**config):
    """Two sparse decoder blocks of one structure: the first of a stack has the relative position bias."""
    return build("switch_transformers", num_decoder_layers=6, num_sparse_decoder_layers=3, num_layers=6, **config)


@pytest.mark.parametrize(("family", "unit"), pairwise(PATHS, UNITS))
def test_a_swap_changes_the_logits_and_leaving_restores_them_bit_for_bit(family, unit):
    model = FAMILIES[family]()
    a, b = two_of(model, unit)
    base, before = logits(model), state(model)
    for exchange in (True, False):
        with swap(model, a, b, unit, exchange):
            inside = logits(model)
        assert not torch.equal(inside, base)
        assert torch.equal(logits(model), base)
        assert same_state(model, before)


@pytest.mark.parametrize(("family", "unit", "exchange"), pairwise(PATHS, UNITS, (True, False)))
def test_a_swap_is_a_model_with_the_weights_elsewhere(family, unit, exchange):
    model = FAMILIES[family]()
    a, b = two_of(model, unit)
    expected = logits(swapped_model(model, a, b, unit, exchange))
    with swap(model, a, b, unit, exchange):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("family", "unit"), zip(PATHS, UNITS, strict=True))
def test_swapping_with_itself_is_the_base(family, unit):
    model = FAMILIES[family]()
    a, _ = two_of(model, unit)
    base = logits(model)
    for exchange in (True, False):
        with swap(model, a, a, unit, exchange):
            assert torch.equal(logits(model), base)


@pytest.mark.parametrize("unit", UNITS)
def test_restored_when_the_block_of_code_fails(unit):
    model = FAMILIES["qwen2_moe"]()
    a, b = two_of(model, unit)
    before = state(model)
    with pytest.raises(KeyError, match="inside"), swap(model, a, b, unit):
        raise KeyError("inside")
    assert same_state(model, before)


@pytest.mark.parametrize("exchange", [exchanged_numbers, exchanged_storages, overwritten])
def test_restored_when_it_fails_half_way(exchange):
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    kept = first.clone(), second.clone()
    pairs = [(first, second), (torch.randn(2, 3), torch.randn(4))]
    if exchange is exchanged_storages:
        pairs[1] = (torch.randn(2), None)
    with pytest.raises((RuntimeError, AttributeError)), exchange(pairs):
        pass
    assert torch.equal(first, kept[0])
    assert torch.equal(second, kept[1])


@pytest.mark.parametrize("unit", UNITS)
def test_nested_swaps_come_off_in_turn(unit):
    model = FAMILIES["mixtral"]()
    named = [(0, 0), (1, 1), (2, 2)] if unit == "expert" else [0, 1, 2]
    base, before = logits(model), state(model)
    with swap(model, named[0], named[1], unit):
        outer = logits(model)
        with swap(model, named[1], named[2], unit), swap(model, named[0], named[2], unit, exchange=False):
            assert not torch.equal(logits(model), outer)
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), base)
    assert same_state(model, before)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_pile_of_swaps_comes_off_bit_for_bit(data):
    model = FAMILIES["gpt_oss"]()
    before = state(model)
    with ExitStack() as stack:
        for _ in range(data.draw(st.integers(1, 5))):
            unit = data.draw(st.sampled_from(UNITS))
            layers = st.integers(0, 2)
            named = st.tuples(layers, st.integers(0, 3)) if unit == "expert" else layers
            a, b, exchange = data.draw(named), data.draw(named), data.draw(st.booleans())
            stack.enter_context(swap(model, a, b, unit, exchange))
    assert same_state(model, before)


def test_two_experts_of_one_layer():
    model = FAMILIES["olmoe"]()
    base = logits(model)
    with swap(model, (1, 0), (1, 3)):
        assert not torch.equal(logits(model), base)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("unit", UNITS)
def test_works_under_inference_mode_and_generates_alike_with_and_without_a_cache(unit):
    model = FAMILIES["qwen3_moe"]()
    a, b = two_of(model, unit)
    ids = inputs_for(model, padding=None)["input_ids"]
    greedy = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.inference_mode():
        plain = model.generate(ids, **greedy).logits
        with swap(model, a, b, unit):
            cached = model.generate(ids, **greedy)
            uncached = model.generate(ids, **greedy, use_cache=False)
        again = model.generate(ids, **greedy).logits
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-4)
    assert not torch.equal(cached.logits[0], plain[0])
    assert torch.equal(torch.stack(plain), torch.stack(again))


@pytest.mark.parametrize("unit", UNITS)
def test_an_encoder_decoder_generates_with_a_cache(unit):
    model = switch_with_deep_decoder(expert_capacity=64)  # with a cache the tokens of a step have all the room
    a, b = two_of(model, unit)
    ids = inputs_for(model, padding=None)["input_ids"]
    with torch.no_grad(), swap(model, a, b, unit):
        cached = model.generate(ids, max_new_tokens=6)
        assert torch.equal(cached, model.generate(ids, max_new_tokens=6, use_cache=False))


@pytest.mark.parametrize("unit", UNITS)
def test_gradients_are_those_of_the_model_with_the_weights_elsewhere(unit):
    model = FAMILIES["mixtral"]().train()
    a, b = two_of(model, unit)
    other = swapped_model(model, a, b, unit, True)
    for one, context in ((model, swap(model, a, b, unit)), (other, nullcontext())):
        with context:
            one(**inputs_for(one)).logits.square().mean().backward()
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


@pytest.mark.parametrize("unit", UNITS)
def test_a_backward_outside_the_context_of_its_forward_fails(unit):
    model = FAMILIES["mixtral"]()
    a, b = two_of(model, unit)
    with swap(model, a, b, unit):
        loss = model(**inputs_for(model)).logits.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_trained_inside_goes_home():
    model = FAMILIES["mixtral"]()
    first, second = (layer.experts[1].down for layer in moe_layers(model)[:2])
    expected = first.clone() + 1, second.clone()
    with torch.no_grad(), swap(model, (0, 1), (1, 1)):
        second.add_(1)  # where the first's weights are now
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


@pytest.mark.parametrize("unit", UNITS)
def test_inside_a_peft_model(unit):
    base = FAMILIES["qwen2_moe"]()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    a, b = two_of(model, unit)
    before, expected = logits(model), logits(swapped_model(model, a, b, unit, True))
    with swap(model, a, b, unit):
        assert torch.equal(logits(model), expected)
    assert not torch.equal(before, expected)
    assert torch.equal(logits(model), before)


def test_an_adapters_experts_are_swapped_where_a_block_has_one_mixture():
    def with_mola(*targets):
        config = MolaConfig(r=2, num_experts=3, top_k=2, target_modules=list(targets), init_lora_weights=False)
        return get_peft_model(tiny.llama(layers=3), config).eval()

    model = with_mola("q_proj")
    base = logits(model)
    for unit, a, b in (("expert", (0, 0), (1, 2)), ("router", 0, 1), ("block", 0, 1)):
        with swap(model, a, b, unit):
            assert not torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert "unit='expert'" in refused(model, 0, 1, "router+experts")
    message = refused(with_mola("q_proj", "v_proj"), (0, 0), (1, 2))
    assert "several mixtures" in message
    assert "q_proj" in message


class Turned(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(16, 16, generator=generator))

    def forward(self, x):
        return x @ self.weight.T


@pytest.mark.parametrize("family", PATHS)
def test_behind_the_identity_it_is_the_plain_swap(family):
    model = FAMILIES[family](dtype=torch.float64)
    a, b = two_of(model, "expert")
    for exchange, aligner in ((False, lambda x: x), (True, (lambda x: x, lambda x: x))):
        with swap(model, a, b, exchange=exchange):
            expected = logits(model)
        with swap(model, a, b, exchange=exchange, aligner=aligner):
            torch.testing.assert_close(logits(model), expected)


def test_the_strange_expert_is_given_what_the_aligner_makes():
    model = FAMILIES["mixtral"](dtype=torch.float64)
    layers, aligners = moe_layers(model), (Turned(0), Turned(1))
    folded = copy.deepcopy(model)
    for place, (source, target) in enumerate((((0, 2), (1, 3)), ((1, 3), (0, 2)))):
        expert = moe_layers(folded)[source[0]].experts[source[1]]
        replacement, matrix = layers[target[0]].experts[target[1]], aligners[place].weight.double()
        with torch.no_grad():
            expert.write(replacement)
            expert.up.copy_(replacement.up @ matrix)
            expert.gate.copy_(replacement.gate @ matrix)
    by_name = {((0, 2), (1, 3)): aligners[0], ((1, 3), (0, 2)): aligners[1]}
    before = logits(model)
    for both in (aligners, by_name):
        with swap(model, (0, 2), (1, 3), aligner=both):
            torch.testing.assert_close(logits(model), logits(folded), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), before)


def test_an_aligner_keeps_its_own_precision():
    model = build("mixtral", dtype=torch.bfloat16, experts_implementation="eager")
    with swap(model, (0, 2), (1, 3), exchange=False, aligner=Turned(0)):
        assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("unit", UNITS)
def test_random_weights_are_of_the_seed_and_leave_nothing_behind(unit):
    model = FAMILIES["qwen2_moe"]()
    a, _ = two_of(model, unit)
    base, before, actual = logits(model), state(model), []
    for seed in (0, 0, 1):
        with randomised(model, a, unit, seed):
            actual.append(logits(model))
    assert torch.equal(actual[0], actual[1])
    assert not torch.equal(actual[0], actual[2])
    assert not torch.equal(actual[0], base)
    assert same_state(model, before)


def refused(model, *arguments, **named) -> str:
    before = state(model)
    with pytest.raises(LamellaError) as caught, swap(model, *arguments, **named):
        pass
    assert same_state(model, before)
    return str(caught.value)


def test_unlike_parts_are_named_both():
    switch = FAMILIES["switch_transformers"]()
    message = refused(switch, 1, 5, "block")
    assert "encoder.block.1" in message
    assert "decoder.block.1" in message
    assert "has no" in message
    message = refused(switch, 0, 1, "block")  # dense and sparse
    assert "encoder.block.0" in message
    assert "encoder.block.1" in message
    message = refused(FAMILIES["deepseek_v3"](), 0, 1, "block")
    assert "model.layers.0" in message


def test_another_number_of_experts_is_told():
    model = FAMILIES["mixtral"]()
    gate = moe_layers(model)[1].router_module
    gate.weight = nn.Parameter(torch.randn(5, 16))
    message = refused(model, 0, 1, "router")
    assert "(4, 16) and (5, 16)" in message
    assert "model.layers.0" in message
    assert "model.layers.1" in message


def test_another_precision_is_told():
    model = FAMILIES["mixtral"]()
    model.model.layers[1].bfloat16()
    assert "differ in dtype, torch.float32 and torch.bfloat16" in refused(model, (0, 0), (1, 0))


def test_what_is_not_there_is_refused():
    deepseek, mixtral = FAMILIES["deepseek_v3"](), FAMILIES["mixtral"]()
    assert "those that have one are 1, 2" in refused(deepseek, (0, 0), (1, 0))
    assert "experts 0 to 3, not 4" in refused(mixtral, (0, 4), (1, 0))
    assert "(layer, expert)" in refused(mixtral, 0, 1)
    assert "blocks 0 to 2" in refused(mixtral, 0, 3, "block")
    assert "'layer' is not one of" in refused(mixtral, 0, 1, "layer")
    with pytest.raises(LamellaError, match="has no experts"):
        expert_pairs(deepseek, 0, 1)


def test_aligners_that_do_not_fit_are_refused():
    model, aligner = FAMILIES["mixtral"](), Turned(0)
    assert "both directions" in refused(model, (0, 0), (1, 0), aligner=aligner)
    assert "give a pair" in refused(model, (0, 0), (1, 0), aligner=(aligner,))
    assert "no aligner for (1, 0)" in refused(model, (0, 0), (1, 0), aligner={((0, 0), (1, 0)): aligner})
    assert "stands before an expert" in refused(model, 0, 1, "block", exchange=False, aligner=aligner)


def test_tied_weights():
    model = FAMILIES["mixtral"]()
    layers = model.model.layers
    layers[2].mlp.gate.weight = layers[0].mlp.gate.weight
    assert "tied to model.layers.2.mlp.gate.weight" in refused(model, 0, 1, "router")
    base = logits(model)
    with swap(model, 0, 2, "router"):  # the weight is in both places already
        assert torch.equal(logits(model), base)
    layers[2].mlp.experts.down_proj = layers[0].mlp.experts.down_proj
    assert "tied within or between" in refused(model, (0, 0), (2, 1))
    layers[1].mlp.gate.bias = layers[1].mlp.gate.weight
    layers[0].mlp.gate = copy.deepcopy(layers[1].mlp.gate)
    layers[0].mlp.gate.bias = nn.Parameter(layers[0].mlp.gate.weight.detach().clone())
    assert "tied within or between" in refused(model, 0, 1, "router")


def test_pairs():
    switch = switch_with_deep_decoder()
    sparse = [layer.index for layer in moe_layers(switch)]
    encoder, decoder = [at for at in sparse if at < 6], [at for at in sparse if at >= 6]
    expected = [(i, j) for side in (encoder, decoder) for i in side for j in side if i < j]
    assert layer_pairs(switch, "router+experts") == expected
    assert set(layer_pairs(switch, "block", ordered=True)) == {*expected, *((j, i) for i, j in expected)}
    assert len(expert_pairs(switch, sparse[0], sparse[1])) == 16
    assert len(expert_pairs(switch, sparse[0], sparse[0])) == 6
    with pytest.raises(LamellaError, match="expert_pairs"):
        layer_pairs(switch, "expert")
