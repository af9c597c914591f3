"""What a MoLEx model says with a cache it says without one, in every decoder family and however it generates."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import lamella
from lamella import LamellaError, MolexConfig
from lamella.backbones import BlockCall
from lamella.lab.data import load_backbone
from lamella.tuners.cache import DecisionLayer

BLOCKS, ROWS, PROMPT, NEW = 4, 5, 7, 4
SHAPE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": 40, "n_positions": 64, "n_embd": 16, "n_layer": BLOCKS, "n_head": 2, "n_inner": 24}
    without = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **without, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def _opt() -> PreTrainedModel:
    shape = {name: value for name, value in SHAPE.items() if name not in ("intermediate_size", "head_dim")}
    return OPTForCausalLM(OPTConfig(**shape, ffn_dim=24, word_embed_proj_dim=16))


def _t5() -> PreTrainedModel:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "dropout_rate": 0.0}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    # Fewer blocks in the decoder, as transformers then makes caches with layers to spare.
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens, num_layers=BLOCKS + 1, num_decoder_layers=BLOCKS))


def _mamba() -> PreTrainedModel:
    sizes = {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "time_step_rank": 2, "num_hidden_layers": BLOCKS}
    return MambaForCausalLM(MambaConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def _lfm2() -> PreTrainedModel:
    return Lfm2ForCausalLM(Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"] * 2, conv_L_cache=3))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=5, layer_types=MIXED)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=5, layer_types=MIXED)),
    "gpt2": _gpt2,
    "opt": _opt,
    "t5": _t5,
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=BLOCKS, n_head=2)),
    "mamba": _mamba,
    "lfm2": _lfm2,
}


# Families whose way through the cache is another one: all of it, a window, windows in some layers, positions counted by
# the model, and two caches in one.
PATHS = [("llama", 1), ("mistral", 2), ("gemma2", 1), ("gpt2", 2), ("t5", 1), ("t5", 2)]


@functools.cache
def shared(family: str, top_k: int = 1) -> PeftModel:
    """The same for all tests that only ask it."""
    return mixture(family, top_k=top_k)


def mixture(family: str, **settings: Any) -> PeftModel:
    """A tiny model whose guests weigh as much as its own blocks, and whose router tells sequences apart.

    In float64, so that no two tokens are as likely up to rounding; but Gemma 2 takes its softmax in float32 and cannot
    mask whole rows of float64 there.
    """
    torch.manual_seed(0)
    base = FAMILIES[family]().to(torch.float32 if family == "gemma2" else torch.float64).eval()
    _spread_out(base, 0.3)
    targets = ["in_proj"] if family in ("mamba", "lfm2") else None  # else those that PEFT knows
    lora = LoraConfig(
        r=2, lora_alpha=2, init_lora_weights=False, fan_in_fan_out=family == "gpt2", target_modules=targets
    )
    model = get_peft_model(base, MolexConfig(**{"alpha": 0.5, "lora": lora, **settings})).eval()
    _spread_out({name: p for name, p in model.named_parameters() if "molex_router" in name}, 4.0)
    return model


def _spread_out(parameters: nn.Module | dict[str, nn.Parameter], std: float) -> None:
    named = dict(parameters.named_parameters()) if isinstance(parameters, nn.Module) else parameters
    for parameter in named.values():
        if parameter.dim() > 1:
            nn.init.normal_(parameter.data, std=std)


def prompts(padded: bool = True) -> dict[str, Tensor]:
    """Prompts of unlike lengths, padded on the left."""
    ids = torch.randint(3, 40, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(ROWS):
            mask[row, : row % 4] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def say(model: PeftModel, given: dict[str, Tensor], **options: Any) -> Tensor:
    """The tokens it generates, and that with a cache its rows had chosen different guests."""
    torch.manual_seed(5)
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    output = model.generate(**given, **settings, return_dict_in_generate=True)
    if settings.get("use_cache", True):
        assert_rows_differ(output.past_key_values)
    return output.sequences


def assert_rows_differ(cache: Any, blocks: int = BLOCKS) -> None:
    layers = (cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache).layers
    (decisions,) = [layer.decisions for layer in layers if isinstance(layer, DecisionLayer)]
    chosen = [decision.tensors[0] for decision in decisions.values()]
    assert len(chosen) == blocks
    assert any(len(indices.unique(dim=0)) > 1 for indices in chosen), "all rows have the same guests"
    assert any(bool((indices != depth).any()) for depth, indices in enumerate(chosen)), "no row has a guest"


@pytest.mark.parametrize(("family", "top_k"), [*PATHS, ("opt", 1), ("qwen3", 2)])
def test_greedy_text_is_the_same_with_and_without_a_cache(family: str, top_k: int) -> None:
    model, given = shared(family, top_k), prompts(padded=family != "mistral")
    text = say(model, given, use_cache=False)
    assert torch.equal(say(model, given), text)
    assert torch.equal(say(model, given, cache_implementation="static"), text)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**given, max_new_tokens=NEW), text), "the guests say nothing"


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_recurrent_and_convolutional_states_are_kept_for_each_guest(family: str) -> None:
    """Two rows, left padding and beams: whoever writes into another block's state, or for another row, says else."""
    model, given = shared(family), prompts()
    text = model.generate(**given, max_new_tokens=NEW, use_cache=False, do_sample=False)
    assert torch.equal(model.generate(**given, max_new_tokens=NEW, do_sample=False), text)
    text = model.generate(**given, max_new_tokens=NEW, use_cache=False, num_beams=3)
    assert torch.equal(model.generate(**given, max_new_tokens=NEW, num_beams=3), text)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**given, max_new_tokens=NEW, num_beams=3), text), "guests say nothing"


@pytest.mark.parametrize(("family", "top_k"), [("llama", 2), ("gemma2", 2), ("gpt2", 1), ("t5", 1)])
def test_beam_search_is_the_same_with_and_without_a_cache(family: str, top_k: int) -> None:
    model, given = shared(family, top_k), prompts()
    text = say(model, given, use_cache=False, num_beams=3, num_return_sequences=2)
    assert torch.equal(say(model, given, num_beams=3, num_return_sequences=2), text)
    static = say(model, given, num_beams=3, num_return_sequences=2, cache_implementation="static")
    assert torch.equal(static, text)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_samples_are_the_same_with_and_without_a_cache(family: str) -> None:
    model, given = shared(family), prompts()
    options = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2}
    text = say(model, given, use_cache=False, **options)
    assert torch.equal(say(model, given, **options), text)


def _parts(family: str, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What is given whole, and the ids and the mask that a decoder is given bit by bit."""
    if family != "t5":
        return {}, given["input_ids"], given["attention_mask"]
    decoder = torch.randint(3, 40, (ROWS, PROMPT), generator=torch.Generator().manual_seed(2))
    return given, decoder, torch.ones_like(decoder)


def logits_of_both(model: PeftModel, family: str, kind: str) -> tuple[Tensor, Tensor]:
    """Logits of the real tokens, (N, vocabulary): of one forward, and of a prefill of 4 tokens with steps after it."""
    whole, ids, mask = _parts(family, prompts())
    names = ("decoder_input_ids", "decoder_attention_mask") if family == "t5" else ("input_ids", "attention_mask")
    start, steps = 4, []
    with torch.no_grad(), lamella.prompt(mask[:, :start].sum(dim=1)):
        at_once = model(**whole, **dict(zip(names, (ids, mask), strict=True)), use_cache=False).logits
        cache = make_cache(model, family, kind)
        for begin, end in ((0, start), (start, start + 1), (start + 1, PROMPT)):
            part = dict(zip(names, (ids[:, begin:end], mask[:, :end]), strict=True))
            output = model(**whole, **part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert_rows_differ(cache)
    return at_once[mask.bool()], torch.cat(steps, dim=1)[mask.bool()]


def make_cache(model: PeftModel, family: str, kind: str) -> Any:
    """An empty cache; None lets the model make a dynamic one."""
    if kind == "dynamic":
        return None
    config = model.config.get_text_config(decoder=True)
    own = StaticCache(config=config, max_cache_len=PROMPT + 2)
    return EncoderDecoderCache(own, StaticCache(config=config, max_cache_len=PROMPT)) if family == "t5" else own


@pytest.mark.parametrize(("family", "top_k"), [("gemma2", 1), ("llama", 2), ("t5", 2)])
def test_guests_that_run_on_all_rows_write_only_those_that_chose_them(
    family: str, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared(family, top_k)
    expected = say(model, prompts())
    for can_cut in (lambda call, _: False, lambda call, _: call.hidden_states.shape[1] == 1):  # none, or after a prompt
        monkeypatch.setattr(BlockCall, "can_cut", can_cut)
        assert torch.equal(say(model, prompts()), expected)


def test_an_alibi_for_each_head_of_each_sequence_is_no_obstacle() -> None:
    model, given = mixture("bloom"), prompts(padded=False)
    assert torch.equal(say(model, given), say(model, given, use_cache=False))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("family", "top_k"), [*PATHS, ("qwen2", 1), ("gemma3", 2)])
def test_prefill_and_steps_give_the_logits_of_one_forward(family: str, top_k: int, kind: str) -> None:
    at_once, by_steps = logits_of_both(shared(family, top_k), family, kind)
    # Several families take norms, rotations or softmax in float32 whatever the model's precision.
    torch.testing.assert_close(by_steps, at_once, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_guests_in_bfloat16_have_caches_too(kind: str) -> None:
    at_once, by_steps = logits_of_both(mixture("llama", guest_dtype="bfloat16").float(), "llama", kind)
    torch.testing.assert_close(by_steps, at_once, rtol=0, atol=0.02)


@pytest.mark.parametrize("family", ["mistral", "t5", "lfm2"])
def test_training_is_the_same_with_the_cache_that_models_make_unasked(family: str) -> None:
    model, given = mixture(family).train(), prompts()
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    gradients = []
    for use_cache in (False, True):
        model(**given, use_cache=use_cache).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert any("molex_router" in name for name in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["mistral", "t5"])
def test_a_row_says_alone_what_it_says_among_others(family: str) -> None:
    model, given = shared(family), prompts()
    together = say(model, given)
    for row in range(ROWS):
        alone = {name: tensor[row : row + 1] for name, tensor in given.items()}
        if family != "t5":
            alone = {name: tensor[:, row % 4 :] for name, tensor in alone.items()}
        said = model.generate(**alone, max_new_tokens=NEW, do_sample=False)
        new = said[0, alone["input_ids"].shape[1] :] if family != "t5" else said[0]
        expected = together[row, PROMPT:] if family != "t5" else together[row]
        assert torch.equal(new, expected[: len(new)])


def test_a_cache_is_used_again_after_a_reset() -> None:
    model, cache = shared("llama"), DynamicCache()
    given = prompts()
    for ids in (given["input_ids"], given["input_ids"].flip(0).flip(1)):
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache.reset()
        assert torch.equal(say(model, given, past_key_values=cache), say(model, given, use_cache=False))


@pytest.mark.parametrize("settings", [{"router_scope": "per-layer"}, {"policy": "random"}, {"policy": "uniform"}])
def test_the_other_ways_to_choose_generate_the_same_too(settings: dict[str, Any]) -> None:
    model, given = mixture("llama", **settings), prompts()
    text = model.generate(**given, max_new_tokens=NEW, use_cache=False)
    assert torch.equal(model.generate(**given, max_new_tokens=NEW), text)
    assert torch.equal(model.generate(**given, max_new_tokens=NEW, cache_implementation="static"), text)


def test_a_token_that_goes_on_works_out_no_guests_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, worked_out, unique = shared("llama"), [], torch.unique

    def count(*args: Any, **kwargs: Any) -> Any:
        worked_out.append(args)
        return unique(*args, **kwargs)

    monkeypatch.setattr(torch, "unique", count)
    ids, seen = torch.arange(3, 9)[None], []
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        for token in range(3):
            seen.append(len(worked_out))
            model(input_ids=torch.tensor([[20 + token]]), past_key_values=cache)
    assert seen[1] > 0
    assert seen[2] == seen[1] == len(worked_out)


def test_a_cache_filled_by_the_base_model_is_refused() -> None:
    model, given = mixture("llama"), prompts(padded=False)
    with torch.no_grad(), model.disable_adapter():
        cache = model(**given, use_cache=True).past_key_values
    with pytest.raises(LamellaError, match="empty cache"):
        model(input_ids=given["input_ids"][:, :1], past_key_values=cache)


def test_an_offloaded_cache_is_refused_before_anything_is_said() -> None:
    cache = DynamicCache(config=mixture("llama").config)
    cache.offloading = True
    with pytest.raises(LamellaError, match="offloaded DynamicCache"):
        mixture("llama").generate(**prompts(), max_new_tokens=NEW, past_key_values=cache)


@pytest.mark.real
def test_smollm2_says_the_same_with_and_without_a_cache() -> None:
    backbone = load_backbone("smollm2")
    texts = ["The government said on Tuesday that", "Once upon a time"]
    given = backbone.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(0)
    model = get_peft_model(backbone.model, MolexConfig(alpha=0.9)).eval()
    _spread_out({name: p for name, p in model.named_parameters() if "molex_router" in name}, 1.0)
    settings = {"max_new_tokens": 3, "do_sample": False}
    text = model.generate(**given, **settings, use_cache=False)
    output = model.generate(**given, **settings, return_dict_in_generate=True)
    assert torch.equal(output.sequences, text)
    assert_rows_differ(output.past_key_values, blocks=30)


def _in_parts(model: PeftModel, *ends: int) -> Tensor:
    ids, cache, parts = prompts(padded=False)["input_ids"], None, []
    with torch.no_grad():
        for begin, end in zip((0, *ends), ends, strict=False):
            output = model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


def test_a_sequence_goes_on_only_if_its_guests_were_chosen_from_the_whole_prompt() -> None:
    model = shared("llama")  # prompt_tokens is 4
    torch.testing.assert_close(_in_parts(model, 5, 6, PROMPT), _in_parts(model, PROMPT))
    with pytest.raises(LamellaError, match=r"by the first 3 tokens, .* by the first 4 tokens, run without it"):
        _in_parts(model, 3, PROMPT)
    with lamella.prompt([3] * ROWS):
        torch.testing.assert_close(_in_parts(model, 3, PROMPT), _in_parts(model, PROMPT))
    with lamella.prompt([6] * ROWS), pytest.raises(LamellaError, match=r"first 5 tokens, .* first 6 tokens"):
        _in_parts(model, 5, PROMPT)


@torch.no_grad()
def test_a_guest_reads_a_prompt_of_one_token_with_nothing_in_itself() -> None:
    """RecurrentGemma's blocks keep states in themselves, and the guest has run as a block before."""
    sizes = {key: value for key, value in SHAPE.items() if key not in ("head_dim", "max_position_embeddings")}
    blocks = {"block_types": ("recurrent", "recurrent", "attention"), "lru_width": 16, "attention_window_size": 8}
    torch.manual_seed(0)
    base = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes | blocks))
    _spread_out({name: p for name, p in base.named_parameters() if p.dim() > 1}, 0.2)
    model = get_peft_model(base, MolexConfig(alpha=0.5, policy="fixed", fixed_layer=0, lora=None)).eval()
    asked = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    ids = torch.tensor([[5], [9]])
    cached, plain = (
        model.generate(ids, use_cache=cache, return_dict_in_generate=True, **asked).logits for cache in (True, False)
    )
    torch.testing.assert_close(cached, plain)
    assert not torch.allclose(plain[0][0], plain[0][1])
