"""The one way in which decisions travel with a cache, for the methods that decide for whole sequences."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, LlamaConfig, MistralConfig, Qwen3Config, StaticCache

import lamella
from lamella import LamellaError
from lamella.routing import CachedDecision, CallTracker, Frame, RoutedCall
from lamella.routing.prompt import prompt_of
from lamella.tuners.cache import DecisionLayer, DecisionsInCache, recall

FULL = LlamaConfig(num_hidden_layers=2)
SLIDING = MistralConfig(num_hidden_layers=2, sliding_window=5)
HYBRID = Qwen3Config(
    num_hidden_layers=2, use_sliding_window=True, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
)
CACHES: dict[str, Callable[[], Cache]] = {
    "lazy": DynamicCache,
    "dynamic": lambda: DynamicCache(config=FULL),
    "sliding": lambda: DynamicCache(config=SLIDING),
    "hybrid": lambda: DynamicCache(config=HYBRID),
    "static": lambda: StaticCache(config=FULL, max_cache_len=9),
    "static-hybrid": lambda: StaticCache(config=HYBRID, max_cache_len=9),
    "encoder-decoder": lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
}
KEY = ("default", "model.layers.0")


def _filled(cache: Cache) -> Cache:
    """Three sequences of four tokens in both of its layers."""
    for part in (cache.self_attention_cache, cache.cross_attention_cache) if _is_pair(cache) else (cache,):
        for layer in range(2):
            part.update(torch.ones(3, 1, 4, 2), torch.ones(3, 1, 4, 2), layer)
    return cache


def _is_pair(cache: Cache) -> bool:
    return isinstance(cache, EncoderDecoderCache)


def _decided(cache: Cache) -> Tensor:
    """Decides in a call that is given the cache; returns what was decided."""
    call, decided = RoutedCall(CallTracker(False, ())), torch.randn(3, 2)
    listener = DecisionsInCache()
    listener.opened(call, {"past_key_values": cache})
    call.is_recalled = True  # as by a layer that runs
    call.cached[KEY] = CachedDecision((decided, torch.arange(3)), torch.tensor([[1, 0], [2, 0], [3, 0]]), 4)
    listener.closed(call, None)
    return decided


def _recalled(cache: Cache, lengths: list[int]) -> tuple[Tensor, ...]:
    """What is recalled in a forward of one more token, where the prompts are said to have these lengths."""
    call = RoutedCall(CallTracker(False, ()), prompt=prompt_of(lengths))
    DecisionsInCache().opened(call, {"any_name": cache})
    decision = recall(Frame(call, None, None), KEY, torch.zeros(len(lengths), 1, 2), True, 4)
    assert decision is not None
    return decision.tensors


@pytest.mark.parametrize("name", CACHES)
def test_decisions_go_where_the_rows_go_and_the_cache_looks_as_before(name: str) -> None:
    cache, plain = _filled(CACHES[name]()), _filled(CACHES[name]())
    decided = _decided(cache)
    copied = copy.deepcopy(cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    weights, rows = _recalled(cache, [3, 1, 1])
    assert torch.equal(weights, decided[order])
    assert rows.tolist() == [2, 0, 0]
    if "static" not in name:
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.batch_repeat_interleave(2)
        assert _recalled(cache, [3, 3, 1, 1])[1].tolist() == [2, 2, 0, 0]
        cache.crop(-1)
        assert _recalled(cache, [3, 3, 1, 1])[1].tolist() == [2, 2, 0, 0]
    assert torch.equal(_recalled(copied, [1, 2, 3])[0], decided)
    with pytest.raises(LamellaError, match=r"by the first 1, 2, 3 tokens, and .* by the first 1, 2, 4 tokens"):
        _recalled(copied, [1, 2, 4])
    _decided(copied)
    layers = (copied.self_attention_cache if _is_pair(copied) else copied).layers
    assert sum(isinstance(layer, DecisionLayer) for layer in layers) == 1
    for outside in (
        lambda cache: cache.get_seq_length(),
        lambda cache: cache.get_max_length(),
        lambda cache: [cache.get_mask_sizes(2, layer) for layer in range(2)],
        lambda cache: cache.is_compileable,
        lambda cache: cache.is_croppable,
        lambda cache: cache.is_sliding[:2],
        lambda cache: True in cache.is_sliding and cache.is_sliding.index(True),
        lambda cache: False in cache.is_sliding and cache.is_sliding.index(False),
        lambda cache: any(cache.is_linear),
    ):
        assert outside(copied) == outside(plain)
    copied.reset()
    _filled(copied)
    with pytest.raises(LamellaError, match=r"holds 4 tokens for which model\.layers\.0 has not decided"):
        _recalled(copied, [1, 2, 3])


def test_a_cache_without_tokens_has_nothing_to_go_on_with() -> None:
    cache = _filled(DynamicCache())
    _decided(cache)
    cache.crop(-4)
    call = RoutedCall(CallTracker(False, ()))
    DecisionsInCache().opened(call, {"past_key_values": cache})
    assert recall(Frame(call, None, None), KEY, torch.zeros(3, 1, 2), True, 4) is None


@pytest.fixture(params=["molex", "mole"])
def model(request: pytest.FixtureRequest, folder: Path) -> PeftModel:
    if request.param == "mole":
        return trained.composition("llama", folder)
    return tiny.molex(tiny.llama().double()).double()


IDS = torch.randint(3, tiny.VOCAB, (3, 8), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("begin", [partial(dict), partial(dict, return_dict=False)], ids=["output", "tuple"])
def test_a_cache_that_the_model_made_itself_is_gone_on_with(model: PeftModel, begin: Callable[[], dict]) -> None:
    with torch.no_grad(), lamella.prompt([5] * 3):
        whole = model(input_ids=IDS).logits[:, 5:]
        first = model(input_ids=IDS[:, :5], use_cache=True, **begin())
        cache = first[1] if isinstance(first, tuple) else first.past_key_values
        actual = model(input_ids=IDS[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(actual, whole, rtol=1e-5, atol=1e-6)


def test_another_number_of_sequences_is_refused(model: PeftModel) -> None:
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
        with pytest.raises(LamellaError, match="decisions for 3 sequences"):
            model(input_ids=IDS[:1, 5:], past_key_values=cache)
