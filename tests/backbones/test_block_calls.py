from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, DynamicCache, Lfm2Config

from lamella import LamellaError
from lamella.backbones import BlockCall, hidden_states_of, kinds_of_blocks, locate_stacks, with_hidden_states


class Block(nn.Module):
    """A block as T5 has them: the first makes a bias for all."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_bias: Any = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:
        return hidden_states, torch.zeros(1)


H, MASK = torch.randn(3, 4, 2), torch.randn(3, 1, 4, 4)
ROWS = torch.tensor([0, 2])


def test_arguments_by_place_stay_by_place_and_are_cut_to_some_sequences() -> None:
    cos = torch.randn(1, 4, 2)
    call = BlockCall(Block(), (H, MASK), {"position_embeddings": (cos, cos), "flag": True, "scale": torch.ones(3, 2)})
    args, kwargs = call.on(ROWS, None, (H, None))
    assert torch.equal(args[0], H[ROWS])
    assert torch.equal(args[1], MASK[ROWS])
    assert kwargs["position_embeddings"][0] is cos, "shared by all sequences"
    assert kwargs["flag"] is True
    assert kwargs["scale"].shape == (3, 2), "nothing says that it has an entry per sequence"
    args, kwargs = call.on(None, None, (H, None))
    assert args[0] is H
    assert args[1] is MASK


def test_what_the_first_block_made_is_given_to_a_guest() -> None:
    made = torch.randn(1, 2, 4, 4)
    _, kwargs = BlockCall(Block(), (), {"hidden_states": H}).on(None, None, (H, made))
    assert kwargs["position_bias"] is made
    own = torch.randn(3, 2, 4, 4)
    args, _ = BlockCall(Block(), (H, None, own), {}).on(ROWS, None, (H, made))
    assert torch.equal(args[2], own[ROWS])


def test_the_cache_is_found_by_what_it_is_and_replaced() -> None:
    cache = DynamicCache()
    for args, kwargs in (((H,), {"past_key_values": cache}), ((H, MASK, None, cache), {}), ((H,), {"any_name": cache})):
        call = BlockCall(Block(), args, kwargs)
        assert call.cache is cache
        found_args, actual = call.on(None, "view", (H, None))
        found = [*found_args, *actual.values()]
        assert "view" in [value for value in found if isinstance(value, str)]
        assert not any(value is cache for value in found)
    assert BlockCall(Block(), (H,), {"past_key_values": None}).cache is None


@pytest.mark.parametrize(
    ("arguments", "can"),
    [
        ({"position_ids": torch.zeros(3, 4), "use_cache": True, "position_bias": None}, True),
        ({"attention_mask": MASK, "position_embeddings": (torch.zeros(1, 4, 2),) * 2}, True),
        ({"position_bias": torch.zeros(1, 2, 4, 4), "table": torch.zeros(4, 5)}, True),
        ({"attention_mask": object()}, False),
        ({"alibi": torch.zeros(6, 1, 4)}, False),
        ({"position_bias": torch.zeros(3, 1, 4)}, False),  # MPT's, for three heads
        ({"position_ids": torch.zeros(3, 3, 4)}, False),
        ({"per_layer_input": torch.zeros(3, 4, 2)}, False),
        ({"lang_ids": torch.zeros(3)}, False),
        ({"masks": {"full": torch.zeros(2, 3)}}, False),
    ],
)
def test_only_what_is_known_to_have_an_entry_per_sequence_is_cut(arguments: dict[str, Any], can: bool) -> None:
    assert BlockCall(Block(), (H,), arguments).can_cut((H,)) is can


def test_the_bias_of_cross_attention_is_found_behind_attention_weights() -> None:
    class Cross(Block):
        def forward(  # type: ignore[override]
            self,
            hidden_states: Tensor,
            position_bias: Any = None,
            encoder_hidden_states: Any = None,
            encoder_decoder_position_bias: Any = None,
        ) -> None: ...

    bias, cross, weights = (torch.randn(1, 2, 4, 4) for _ in range(3))
    call = BlockCall(Cross(), (H,), {"encoder_hidden_states": H})
    for output in ((H, bias, cross), (H, bias, weights, cross, weights)):
        _, kwargs = call.on(None, None, output)
        assert kwargs["position_bias"] is bias
        assert kwargs["encoder_decoder_position_bias"] is cross


def test_states_that_are_not_laid_out_by_sequences_are_refused() -> None:
    with pytest.raises(LamellaError, match=r"^layers\.3 maps states of shape \(2, 3, 4, 2\), not \(batch, tokens"):
        BlockCall(Block(), (torch.zeros(2, 3, 4, 2),), {}).check_states("layers.3")
    with pytest.raises(LamellaError, match=r"layers\.3 is given a state that each block keeps.*use_cache=False"):
        BlockCall(Block(), (H,), {"state": [H]}).check_states("layers.3")


def test_outputs_with_and_without_company() -> None:
    other = torch.zeros(1)
    assert hidden_states_of((H, other)) is hidden_states_of(H) is H
    assert with_hidden_states(H, other) is other
    assert with_hidden_states((H, "bias"), other) == (other, "bias")
    assert with_hidden_states([H, "bias"], other) == [other, "bias"]


def kinds(model: nn.Module) -> list[str]:
    return [kind for stack in locate_stacks(model) for kind in kinds_of_blocks(model, stack)]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_blocks_of_a_family_are_alike_where_their_attention_is(name: str) -> None:
    actual = kinds(tiny.build(name))
    if name in ("gemma2", "gemma3"):
        assert actual[0] == actual[2] != actual[1] == actual[3]
        assert "sliding" in actual[0]
        assert "full" in actual[1]
    elif name == "t5":
        assert len(set(actual[:4])) == len(set(actual[4:])) == 1
    else:
        assert len(set(actual)) == 1


def test_blocks_that_mix_tokens_in_other_ways_are_unlike_whatever_their_feed_forward() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.device("meta"):
        convolution = AutoModelForCausalLM.from_config(Lfm2Config(**small, layer_types=["conv", "full_attention"] * 2))
        sparse = DeepseekV3Config(
            **{**small, "num_key_value_heads": 2}, first_k_dense_replace=2, n_group=1, topk_group=1, n_routed_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=8,
        )  # fmt: skip
        some_dense = AutoModelForCausalLM.from_config(sparse)
    actual = kinds(convolution)
    assert actual[0] == actual[2] != actual[1] == actual[3]
    assert "conv" in actual[0]
    assert len(set(kinds(some_dense))) == 1


def test_what_only_the_config_says_of_a_blocks_attention_counts() -> None:
    model = tiny.llama(layers=3)
    model.model.config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    actual = kinds(model)
    assert actual[0] == actual[2] != actual[1]
