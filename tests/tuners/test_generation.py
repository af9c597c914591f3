"""However a model generates, it says what it says without a cache, or says why it cannot before the first token."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

import lamella
from lamella import LamellaError

OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": tiny.PAD}
IDS = torch.randint(3, tiny.VOCAB, (2, 6), generator=torch.Generator().manual_seed(3))
METHODS = ("molex", "mole")


@pytest.fixture(scope="module", params=METHODS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    return _adapted("llama", request.param, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module", params=METHODS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    return _adapted("t5", request.param, tmp_path_factory.mktemp("loras"))


def _adapted(kind: str, method: str, folder: Path) -> PeftModel:
    """An adapter whose decision is felt: embeddings far apart, so that texts differ where decisions do."""
    if method == "mole":
        model = trained.composition(kind, folder, layers=3)
        trained.sharpen(model, scale=8.0)
    else:
        model = tiny.molex(tiny.build(kind, layers=3).double(), alpha=0.3).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "lamella" not in name and "lora" not in name:
                parameter.mul_(8 if "embed" not in name and "shared" not in name else 20)
    return model


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{**OPTIONS, **options})


def without_cache(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return generate(model, ids, use_cache=False, **options)


def _conversation(model: PeftModel, cache: Cache) -> Iterator[tuple[Tensor, Tensor]]:
    """Three turns with one cache: what is said with it, and from the whole conversation without."""
    ids = IDS
    for _ in range(3):
        said = generate(model, ids, past_key_values=cache)
        yield said, without_cache(model, ids)
        ids = torch.cat([said, IDS[:, :2] + 1], dim=1)


def test_the_prompt_is_felt(decoder: PeftModel) -> None:
    """Without this the other tests would say nothing: the same ids under another prompt go on in another way."""
    with lamella.prompt([2, 2]):
        assert not torch.equal(without_cache(decoder, IDS), said := without_cache(decoder, IDS.flip(1)))
    assert not torch.equal(without_cache(decoder, IDS.flip(1)), said)


@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(tiny.llama_config(3), max_cache_len=40)])
def test_a_conversation_with_a_kept_cache(decoder: PeftModel, make: Callable[[], Cache]) -> None:
    cache = make()
    for said, expected in _conversation(decoder, cache):
        assert torch.equal(said, expected)
        assert cache.get_seq_length() == said.shape[1] - 1


def test_a_conversation_by_one_stated_prompt_reads_nothing_again(
    decoder: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cache, "reset", lambda self: pytest.fail("the cache is emptied"))
    with lamella.prompt([4, 4]):
        for said, expected in _conversation(decoder, DynamicCache()):
            assert torch.equal(said, expected)


@pytest.mark.parametrize("stated", [False, True])
def test_a_beginning_that_several_prompts_share(decoder: PeftModel, stated: bool) -> None:
    def run() -> None:
        with torch.no_grad():
            begun = decoder(input_ids=IDS[:, :5], use_cache=True).past_key_values
        for last in (3, 4):
            ids = torch.cat([IDS[:, :5], torch.full((2, 1), last)], dim=1)
            cache = copy.deepcopy(begun)
            assert torch.equal(generate(decoder, ids, past_key_values=cache), without_cache(decoder, ids))

    if stated:
        with lamella.prompt([5, 5]):
            run()
    else:
        run()


def test_only_the_new_ids(decoder: PeftModel) -> None:
    def turn() -> tuple[Tensor, Tensor]:
        cache = DynamicCache()
        said = generate(decoder, IDS, past_key_values=cache)
        whole = torch.cat([said, IDS[:, :2]], dim=1)
        new = {"input_ids": whole[:, cache.get_seq_length() :], "attention_mask": torch.ones_like(whole)}
        again = decoder.generate(**new, past_key_values=cache, **OPTIONS)
        return again[:, new["input_ids"].shape[1] :], without_cache(decoder, whole)[:, whole.shape[1] :]

    with pytest.raises(LamellaError, match=r"holds 10 tokens .* only what comes after .* lamella\.prompt"):
        turn()
    with lamella.prompt([6, 6]):
        said, expected = turn()
    assert torch.equal(said, expected)


def test_in_chunks(decoder: PeftModel) -> None:
    assert torch.equal(generate(decoder, IDS, prefill_chunk_size=2), without_cache(decoder, IDS))
    for lengths in ([2, 2], [3, 1]):
        with lamella.prompt(lengths):
            assert torch.equal(generate(decoder, IDS, prefill_chunk_size=2), without_cache(decoder, IDS))


@pytest.mark.parametrize(
    "negative",
    [{}, {"negative_prompt_ids": IDS[:, :1]}, {"negative_prompt_ids": IDS.flip(1).repeat(1, 2)}],
    ids=["last token", "a beginning of the prompt", "longer than the prompt"],
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_classifier_free_guidance(decoder: PeftModel, negative: dict[str, Tensor], options: dict[str, int]) -> None:
    if options and negative:
        negative = {name: ids.repeat_interleave(2, dim=0) for name, ids in negative.items()}
    options = {**options, **negative, "guidance_scale": 2.5}
    assert torch.equal(generate(decoder, IDS, **options), without_cache(decoder, IDS, **options))


def test_the_unconditional_side_of_guidance_decides_for_itself(decoder: PeftModel) -> None:
    """With all weight on it, the text is what its prompt alone goes on with."""
    negative = IDS[:1].flip(1)[:, :4]
    one = {"max_new_tokens": 1, "min_new_tokens": 1}
    beside = generate(decoder, IDS[:1], guidance_scale=1e-9, negative_prompt_ids=negative, **one)
    assert torch.equal(beside[:, -1:], without_cache(decoder, negative, **one)[:, -1:])


@pytest.mark.parametrize("way", ["early exit", "another model", "the same model", "prompt lookup"])
def test_assisted(decoder: PeftModel, way: str) -> None:
    ids = IDS[:1].repeat(1, 2)
    options: dict[str, dict[str, Any]] = {
        "early exit": {"assistant_early_exit": 1},
        "another model": {"assistant_model": tiny.llama(seed=1).double()},
        "the same model": {"assistant_model": decoder.get_base_model()},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
    }
    assert torch.equal(generate(decoder, ids, **options[way]), without_cache(decoder, ids))
    assert decoder.config.num_hidden_layers == 3


def test_as_an_assistant(decoder: PeftModel) -> None:
    target, ids = tiny.llama(seed=1).double(), IDS[:1]
    assert torch.equal(generate(target, ids, assistant_model=decoder.get_base_model()), without_cache(target, ids))


def test_without_a_prompt(decoder: PeftModel) -> None:
    expected = decoder.generate(use_cache=False, **OPTIONS)
    for options in ({}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(decoder.generate(**options, **OPTIONS), expected)


def test_from_embeddings(decoder: PeftModel) -> None:
    embeddings = decoder.get_input_embeddings()(IDS)
    said = decoder.generate(inputs_embeds=embeddings, attention_mask=torch.ones_like(IDS), **OPTIONS)
    assert torch.equal(said, without_cache(decoder, IDS)[:, IDS.shape[1] :])


def _by_hand(model: PeftModel, *ends: int) -> Tensor:
    ids, cache, parts = torch.cat([IDS, IDS[:, :3]], dim=1), None, []
    for begin, end in zip((0, *ends), ends, strict=False):
        output = model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def test_token_by_token(decoder: PeftModel) -> None:
    near = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(_by_hand(decoder, 5, 6, 7, 9), _by_hand(decoder, 9), **near)
    for length, ends in ((1, (1, 2, 3, 9)), (5, (5, 6, 9))):
        with lamella.prompt([length] * 2):
            torch.testing.assert_close(_by_hand(decoder, *ends), _by_hand(decoder, 9), **near)
    with pytest.raises(LamellaError, match=r"by the first token, .* by the first 4 tokens, .*\(lamella\.prompt\)"):
        _by_hand(decoder, 1, 2)
    cache = generate(decoder, IDS, return_dict_in_generate=True).past_key_values
    with pytest.raises(LamellaError, match=r"by the first 6 tokens, .* by the first 4 tokens, run without it"):
        decoder(input_ids=IDS[:, :1], past_key_values=cache)


def test_continuous_batching_is_refused_where_it_is_asked_for(decoder: PeftModel) -> None:
    for ask in (
        lambda: decoder.generate_batch(inputs=IDS.tolist(), max_new_tokens=3),
        lambda: decoder.init_continuous_batching(),
        lambda: decoder.generate(IDS, cache_implementation="paged", max_new_tokens=3),
    ):
        with pytest.raises(LamellaError, match=r"model\.layers\.0.* paged cache of continuous batching"):
            ask()
    with decoder.disable_adapter():
        assert decoder.init_continuous_batching() is not None


class _Paged:
    """Stands for a cache that is none of transformers' Cache classes."""

    def update(self, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return keys, values


def test_a_foreign_cache_is_refused_whatever_the_argument_is_called(decoder: PeftModel) -> None:
    with pytest.raises(LamellaError, match=r"model\.layers\.0.* given a _Paged"):
        decoder(input_ids=IDS, use_cache=False, anything=_Paged())


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": "t5"}],
    ids=str,
)
def test_an_encoder_decoder(pair: PeftModel, options: dict[str, Any]) -> None:
    ids = IDS if "num_beams" in options or not options else IDS[:1]
    if "assistant_model" in options:
        options = {"assistant_model": tiny.t5(seed=1).double()}
    plain = {name: value for name, value in options.items() if name.startswith("num_")}
    assert torch.equal(generate(pair, ids, **options), without_cache(pair, ids, **plain))


def test_an_encoder_decoder_that_is_given_the_decoders_beginning(pair: PeftModel) -> None:
    begun = {"decoder_input_ids": torch.tensor([[tiny.PAD, 7, 9]])}
    expected = without_cache(pair, IDS[:1], **begun)
    assert torch.equal(generate(pair, IDS[:1], **begun), expected)
    assert torch.equal(generate(pair, IDS[:1], **begun, prompt_lookup_num_tokens=2), expected)
    without_start = {"decoder_input_ids": torch.tensor([[7, 9]])}  # transformers puts the start token before it
    assert torch.equal(generate(pair, IDS[:1], **without_start), expected)
    with pytest.raises(LamellaError, match=r"guessed tokens .* lamella\.prompt"):
        generate(pair, IDS[:1], **without_start, prompt_lookup_num_tokens=2)
    with lamella.prompt([3]):
        assert torch.equal(generate(pair, IDS[:1], **without_start, prompt_lookup_num_tokens=2), expected)
