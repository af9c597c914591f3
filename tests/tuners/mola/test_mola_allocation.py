from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tests import tiny
from tests.reference import mola
from transformers import LlamaConfig, LlamaForCausalLM

import lamella
from lamella import LamellaError, MolaConfig, allocate

SHAPES = {
    "rectangle": [5, 5, 5, 5],
    "triangle": [8, 6, 4, 2],
    "inverted-triangle": [2, 4, 6, 8],
    "hourglass": [8, 2, 2, 8],
    "diamond": [2, 8, 8, 2],
}


def test_the_published_shape_on_depths_that_four_does_not_divide() -> None:
    assert allocate("2-4-6-8", 6) == [2, 2, 4, 6, 6, 8]
    assert sum(allocate("2-4-6-8", 30)) == 148
    assert allocate("2-4-6-8", 32) == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers", [4, 6, 12, 30, 32])
def test_the_named_shapes(shape: str, layers: int) -> None:
    assert allocate(shape, layers) == mola.allocation(SHAPES[shape], layers)
    assert allocate("-".join(map(str, SHAPES[shape])), layers) == allocate(shape, layers)


def test_numbers_and_lists_are_taken_as_they_are() -> None:
    assert allocate(3, 5) == [3] * 5
    assert allocate([1, 2, 3], 3) == [1, 2, 3]
    assert lamella.allocate is allocate


groups = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(groups, st.integers(0, 40), st.integers(4, 40))
def test_a_budget_keeps_total_proportion_and_order(shape: list[int], more: int, quarters: int) -> None:
    layers, budget = len(shape) + more, quarters / 4
    counts = mola.allocation(shape, layers)
    scaled = allocate("-".join(map(str, shape)), layers, expert_budget=budget)
    total = round(budget * layers)
    assert sum(scaled) == total
    assert min(scaled) >= 1
    owed = mola.budget_shares(counts, total)
    for layer, (count, share) in enumerate(zip(scaled, owed, strict=True)):
        assert abs(count - share) < 1  # largest remainder never strays further than rounding
        for other in range(layers):
            if counts[layer] > counts[other]:
                assert count >= scaled[other]
    remainders = sorted((share - int(share) for share in owed), reverse=True)
    rounded_up = sum(count > share for count, share in zip(scaled, owed, strict=True))
    assert rounded_up <= sum(remainder > Fraction(0) for remainder in remainders)


def test_a_budget_equal_to_the_shapes_own_mean_changes_nothing() -> None:
    assert allocate("2-4-6-8", 8, expert_budget=5) == allocate("2-4-6-8", 8)
    assert allocate("2-4-6-8", 4, expert_budget=2.5) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("num_experts", "layers", "budget", "message"),
    [
        ([2, 2], 3, None, r"2 entries.*3 blocks.*2-4-6-8"),
        ("pyramid", 4, None, r"'pyramid' is not a shape.*triangle.*2-4-6-8"),
        ("2-4-", 4, None, r"'2-4-' is not a shape"),
        ("2-0-4", 4, None, r"'2-0-4'.*at least one expert"),
        (0, 4, None, r"num_experts=0.*at least one expert"),
        (2**63, 4, None, r"at most 1,000,000"),
        ("²-4", 4, None, r"is not a shape"),
        ("triangle", 4, 1e308, r"expert_budget=1e\+308"),
        (-1, 4, None, r"at least one expert"),
        ([2, 0], 2, None, r"at least one expert"),
        ([2, 2.5], 2, None, r"whole number"),
        ("2-4-6-8", 3, None, r"4 groups.*only 3 layers"),
        (4, 4, 2, r"expert_budget=2.*explicit"),
        ([2, 2], 2, 3, r"expert_budget=3.*explicit"),
        ("2-4", 4, 0.5, r"expert_budget=0.5.*from 1"),
        (2, 0, None, r"layers=0"),
    ],
)
def test_a_wrong_allocation_names_the_culprit(num_experts, layers: int, budget, message: str) -> None:
    with pytest.raises(LamellaError, match=message):
        allocate(num_experts, layers, budget)


@pytest.mark.parametrize(
    ("num_experts", "parameters"),
    [("5-5-5-5", 105_635_840), ("2-4-6-8", 105_635_840), ("4-4-4-4", 84_508_672), ("8-8-8-8", 169_017_344)],
)
def test_llama_2_7b_has_the_published_number_of_parameters(num_experts: str, parameters: int) -> None:
    with torch.device("meta"):
        base = LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
        )
        model = get_peft_model(base, MolaConfig(r=8, num_experts=num_experts))
    assert model.get_nb_trainable_parameters()[0] == parameters
    summary = model.base_model.summary()
    assert summary.trainable == parameters
    assert summary.modules == {"model.layers": [7] * 32}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_each_block_has_the_experts_of_its_depth(name: str) -> None:
    model = tiny.adapted(tiny.MODELS[name](layers=3), num_experts=[1, 2, 4], top_k=[1, 1, 3])
    layers = [module for module in model.modules() if isinstance(module, tiny.MolaLinear)]
    assert {layer.place.layer for layer in layers} == {0, 1, 2}
    for layer in layers:
        experts, top_k = [(1, 1), (2, 1), (4, 3)][layer.place.layer]
        settings = layer.experts["default"]
        assert (settings.num_experts, settings.top_k) == (experts, top_k)
        assert layer.lamella_mola_lora_A["default"].weight.shape == (experts, 2, layer.in_features)
        assert layer.lamella_mola_lora_B["default"].weight.shape == (experts, layer.out_features, 2)
        assert layer.routed("default") == (experts > 1)
        if experts > 1:
            assert [p.shape for p in layer.lamella_mola_router.parameters()] == [(experts, layer.in_features)]
    summary = model.base_model.summary()
    assert all(counts == [1, 2, 4] for counts in summary.experts.values())
    assert "1 2 4" in str(summary)


def test_a_scaled_shape_uses_all_a_layer_has_and_the_summary_says_so() -> None:
    model = tiny.adapted(tiny.bert(layers=4), num_experts="2-4-6-8", expert_budget=2.5, top_k=2)
    summary = model.base_model.summary()
    assert summary.experts == {"bert.encoder.layer": [1, 2, 3, 4]}
    assert summary.top_k == {"bert.encoder.layer": [1, 2, 2, 2]}
    assert "block 0 has 1 experts after scaling, so its top_k is 1 instead of 2" in str(summary)


def test_encoder_and_decoder_are_allocated_each() -> None:
    model = tiny.adapted(tiny.t5(layers=4), num_experts="1-3", top_k=1)
    assert model.base_model.summary().experts == {"encoder.block": [1, 1, 3, 3], "decoder.block": [1, 1, 3, 3]}
