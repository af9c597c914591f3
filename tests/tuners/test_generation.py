"""However a model generates, it says what it says without a cache, or says why it cannot before the first token."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    RwkvConfig,
    RwkvForCausalLM,
    StaticCache,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

import lamella
from lamella import LamellaError

OPTIONS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": tiny.PAD}
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
        model = trained.composition(kind, folder, layers=2)
        trained.sharpen(model, scale=8.0)
    else:
        model = tiny.molex(tiny.build(kind, layers=4 if kind == "llama" else 2).double(), alpha=0.3).double()
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
    """Two turns with one cache: what is said with it, and from the whole conversation without."""
    ids = IDS
    for _ in range(2):
        said = generate(model, ids, past_key_values=cache)
        yield said, without_cache(model, ids)
        ids = torch.cat([said, IDS[:, :2] + 1], dim=1)


def test_the_prompt_is_felt(decoder: PeftModel) -> None:
    """Without this the other tests would say nothing: the same ids under another prompt go on in another way."""
    with lamella.prompt([2, 2]):
        assert not torch.equal(without_cache(decoder, IDS), said := without_cache(decoder, IDS.flip(1)))
    assert not torch.equal(without_cache(decoder, IDS.flip(1)), said)


@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(tiny.llama_config(4), max_cache_len=40)])
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

    with pytest.raises(LamellaError, match=r"tokens .* other decisions .* only what comes after .* lamella\.prompt"):
        turn()
    with lamella.prompt([6, 6]):
        said, expected = turn()
    assert torch.equal(said, expected)


@pytest.mark.parametrize("turn", ["first", "second"])
def test_one_turn_without_the_adapter(decoder: PeftModel, turn: str) -> None:
    cache, off = DynamicCache(), decoder.disable_adapter
    with off() if turn == "first" else nullcontext():
        ids = torch.cat([generate(decoder, IDS, past_key_values=cache), IDS[:, :2]], dim=1)
    with off() if turn == "second" else nullcontext():
        with lamella.prompt([6, 6]), pytest.raises(LamellaError, match=r"not decided|does not run now"):
            decoder(input_ids=IDS[:, :1], past_key_values=copy.deepcopy(cache))
        assert torch.equal(generate(decoder, ids, past_key_values=cache), without_cache(decoder, ids))


def test_one_turn_with_other_weights(tmp_path: Path) -> None:
    model = trained.composition("llama", tmp_path)
    with lamella.prompt([6, 6]):
        for here, there in (({"news": 1.0}, {"law": 1.0}), ({"news": 1.0}, None), (None, {"law": 1.0})):
            cache = DynamicCache()
            with lamella.fixed_weights(model, here) if here else nullcontext():
                ids = torch.cat([generate(model, IDS, past_key_values=cache), IDS[:, :2]], dim=1)
            with lamella.fixed_weights(model, there) if there else nullcontext():
                with pytest.raises(LamellaError, match="fixed weights"):
                    model(input_ids=IDS[:, :1], past_key_values=copy.deepcopy(cache))
                assert torch.equal(generate(model, ids, past_key_values=cache), without_cache(model, ids))


def test_in_chunks(decoder: PeftModel) -> None:
    assert torch.equal(generate(decoder, IDS, prefill_chunk_size=2), without_cache(decoder, IDS))
    for lengths in ([2, 2], [3, 1]):
        with lamella.prompt(lengths):
            chunked = generate(decoder, IDS, prefill_chunk_size=2, max_new_tokens=1, min_new_tokens=1)
            assert torch.equal(chunked, without_cache(decoder, IDS, max_new_tokens=1, min_new_tokens=1))


@pytest.mark.parametrize(
    ("negative", "options"),
    [(None, {}), (IDS[:, :1], {}), (IDS.flip(1).repeat(1, 2), {}), (None, {"num_beams": 2})],
    ids=["last token", "a beginning of the prompt", "longer than the prompt", "beams"],
)
def test_classifier_free_guidance(decoder: PeftModel, negative: Tensor | None, options: dict[str, int]) -> None:
    options = {**options, "negative_prompt_ids": negative, "guidance_scale": 2.5}
    assert torch.equal(generate(decoder, IDS, **options), without_cache(decoder, IDS, **options))


def test_the_unconditional_side_of_guidance_decides_for_itself(decoder: PeftModel) -> None:
    """With all weight on it, the text is what its prompt alone goes on with."""
    negative = IDS[:1].flip(1)[:, :4]
    one = {"max_new_tokens": 1, "min_new_tokens": 1}
    beside = generate(decoder, IDS[:1], guidance_scale=1e-9, negative_prompt_ids=negative, **one)
    assert torch.equal(beside[:, -1:], without_cache(decoder, negative, **one)[:, -1:])


def test_guidance_that_the_caller_has_made(decoder: PeftModel) -> None:
    said = []
    for use_cache in (True, False):
        guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.5, decoder, IDS[:, :2], use_cache=use_cache)
        said.append(generate(decoder, IDS, use_cache=use_cache, logits_processor=[guidance]))
    assert torch.equal(*said)


def test_a_loop_of_the_callers_own(decoder: PeftModel) -> None:
    def loop(model: Any, input_ids: Tensor, *_: Any, size: int = 6, **more: Any) -> Tensor:
        cache, said = DynamicCache(), input_ids
        for part in input_ids.split(size, dim=1):
            logits = model(input_ids=part, past_key_values=cache).logits
        for _ in range(OPTIONS["max_new_tokens"]):
            new = logits[:, -1:].argmax(dim=-1)
            said = torch.cat([said, new], dim=1)
            logits = model(input_ids=new, past_key_values=cache).logits
        return said

    options = {"custom_generate": loop, "eos_token_id": -1}
    assert torch.equal(generate(decoder, IDS, **options), without_cache(decoder, IDS, eos_token_id=-1))
    with pytest.raises(LamellaError, match=r"hands over 1 of its 6 tokens first\. .*lamella\.prompt"):
        generate(decoder, IDS, size=1, **options)


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
    assert decoder.config.num_hidden_layers == len(decoder.base_model.model.model.layers)


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


@pytest.mark.parametrize("method", METHODS)
def test_states_that_are_in_no_cache_are_refused(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=tiny.VOCAB, hidden_size=tiny.HIDDEN, attention_hidden_size=tiny.HIDDEN, num_hidden_layers=2,
        intermediate_size=24, context_length=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base, lora = RwkvForCausalLM(config), LoraConfig(r=2, target_modules=["key", "value"], init_lora_weights=False)
    if method == "mole":
        for name in ("a", "b"):
            get_peft_model(copy.deepcopy(base), lora).save_pretrained(tmp_path / name)
        model = lamella.compose(base, {name: tmp_path / name for name in ("a", "b")})
    else:
        model = tiny.molex(base, lora=lora)
    model.eval()
    with pytest.raises(LamellaError, match=r"\.blocks\.0.*(transformers' Cache|is given a state).*use_cache=False"):
        generate(model, IDS)
    assert without_cache(model, IDS).shape == (2, 9)


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


def test_speech_is_what_a_random_choice_is_drawn_from() -> None:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=tiny.VOCAB, num_mel_bins=4, d_model=tiny.HIDDEN, encoder_layers=2, decoder_layers=3,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        max_source_positions=6, max_target_positions=20, pad_token_id=tiny.PAD, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3,
    )  # fmt: skip
    model = tiny.molex(WhisperForConditionalGeneration(config).double(), policy="random")
    speech = {"input_features": torch.randn(4, 4, 12, dtype=torch.float64)}
    said = [model.generate(**speech, max_new_tokens=4, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*said)
    with tiny.watch(model) as seen:
        model(**speech, labels=torch.randint(3, tiny.VOCAB, (4, 3)))
    decoders = [routing.indices for place, routing, _ in seen if "decoder" in place.stack]
    assert any(len(indices.unique(dim=0)) > 1 for indices in decoders), "what is heard makes no difference"
