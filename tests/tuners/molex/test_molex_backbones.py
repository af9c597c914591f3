"""In every family a guest is given what the block in whose place it runs is given."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BigBirdConfig,
    BigBirdModel,
    CLIPConfig,
    CLIPModel,
    MptConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SwinConfig,
    SwinModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from lamella import LamellaError
from lamella.tuners.molex import MolexBlock

Call = tuple[MolexBlock, tuple[Any, ...], dict[str, Any], Any]


def calls_of(model: PeftModel) -> list[Call]:
    """Each wrapped block with what it was given and what it returned in one forward."""
    calls: list[Call] = []
    hooks = [
        block.register_forward_hook(
            lambda module, args, kwargs, output: calls.append((module, args, kwargs, output)), with_kwargs=True
        )
        for block in tiny.blocks(model)
    ]
    with torch.no_grad():
        model(**tiny.inputs(model.get_base_model()), use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize(
    ("name", "tau"), [*((name, 2) for name in tiny.FAMILIES), *((name, 0) for name in ("bert", "gemma2", "t5"))]
)
def test_a_guest_computes_what_it_would_in_its_hosts_place(name: str, tau: int) -> None:
    model = tiny.molex(tiny.build(name), policy="fixed", fixed_layer=tau, alpha=0.25)
    mixed = 0
    for block, args, kwargs, output in calls_of(model):
        with torch.no_grad():
            own = block.base_layer(*args, **kwargs)
            if not block.mixtures["default"].depth.mixes:
                assert torch.equal(first(output), first(own))
                continue
            if name == "t5" and block.place.layer == 0:  # (h, mask, position_bias, encoder states, their mask, bias)
                assert args[2] is None
                assert own[1].any(), "the first block makes the bias of all"
                args = (*args[:2], own[1], *args[3:5], own[2])
            guest = block.blocks[tau](*args, **kwargs)
        expected = 0.25 * first(own) + 0.75 * first(guest)
        if block.decoder:  # no prompt is known, so the first tokens run without
            expected = torch.cat([first(own)[:, :4], expected[:, 4:]], dim=1)
        torch.testing.assert_close(first(output), expected)
        assert not torch.allclose(first(own), expected)
        mixed += 1
    assert mixed == {"gemma2": 1, "gemma3": 1, "t5": 6}.get(name, 3)


@pytest.mark.parametrize("stack", ["encoder.block", "decoder.block"])
def test_t5s_first_block_as_a_guest_takes_the_bias_it_is_given(stack: str) -> None:
    model = tiny.molex(tiny.t5(layers=4), policy="fixed", fixed_layer=0)
    (call,) = [call for call in calls_of(model) if call[0].name == f"{stack}.2"]
    block, args, kwargs, output = call
    without = (*args[:2], torch.zeros_like(args[2]), *args[3:])
    with torch.no_grad():
        assert not torch.allclose(first(block(*without, **kwargs)), first(output))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_each_sequence_has_its_own_guest(name: str) -> None:
    model = tiny.molex(tiny.build(name))
    with tiny.watch(model) as seen:
        calls = calls_of(model)
    subsets = 0
    for (block, args, kwargs, output), (place, routing, _) in zip(calls, seen, strict=True):
        assert block.place is place
        with torch.no_grad():
            own = block.base_layer(*args, **kwargs)
            if name == "t5" and place.layer == 0:
                args = (*args[:2], own[1], *args[3:5], own[2])
            guests = [first(other(*args, **kwargs)) for other in block.blocks if alike(block, other)]
        at = [index for index, other in enumerate(block.blocks) if alike(block, other)]
        for row, tau in enumerate(routing.indices[:, 0].tolist()):
            mix = 0.5 * first(own)[row] + 0.5 * guests[at.index(tau)][row]
            if block.decoder:
                mix = torch.cat([first(own)[row, :4], mix[4:]])
            torch.testing.assert_close(first(output)[row], mix, rtol=1e-4, atol=1e-5)
        subsets += len(set(routing.indices[:, 0].tolist())) > 1
    assert subsets, "all sequences chose alike"


def alike(block: MolexBlock, other: torch.nn.Module) -> bool:
    candidates = block.mixtures["default"].depth.candidates
    return any(block.blocks[index] is other for index in candidates)


def test_what_cannot_be_cut_to_the_sequences_of_a_guest_lets_it_run_on_all() -> None:
    base = AutoModelForCausalLM.from_config(MptConfig(d_model=24, n_heads=3, n_layers=4, vocab_size=tiny.VOCAB)).eval()
    model = tiny.molex(base, lora=None)
    ids = torch.randint(3, tiny.VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), tiny.watch(model) as seen:
        together = model(input_ids=ids).logits  # three heads and three sequences
        alone = torch.cat([model(input_ids=row[None]).logits for row in ids])
    assert any(len(set(routing.indices[:, 0].tolist())) > 1 for _, routing, _ in seen[:4])
    torch.testing.assert_close(together, alone)


TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_towers_of_two_widths_have_routers_of_two_widths() -> None:
    text = {**TOWER, "hidden_size": 24, "vocab_size": tiny.VOCAB, "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config={**TOWER, "image_size": 8, "patch_size": 4}, projection_dim=8)
    model = tiny.molex(CLIPModel(config).eval())
    with torch.no_grad():
        output = model(input_ids=torch.full((2, 5), 7), pixel_values=torch.randn(2, 3, 8, 8))
    assert output.logits_per_image.shape == (2, 2)
    routers = {block.place.stack: block.router("default").weight.shape[1] for block in tiny.blocks(model)}
    assert routers == {"vision_model.encoder.layers": 16, "text_model.encoder.layers": 24}


def vision_language_model() -> PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    text = {**TOWER, "hidden_size": 24, "num_key_value_heads": 1, "vocab_size": tiny.VOCAB, "head_dim": 12}
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
    config = Qwen2VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision)
    return Qwen2VLForConditionalGeneration(config).eval()


def test_a_tower_without_sequences_is_left_alone_by_name_and_the_language_model_is_mixed() -> None:
    model = tiny.molex(vision_language_model())
    skipped = dict(model.base_model.summary().skipped)
    assert "all images in one row (cu_seqlens)" in skipped["model.visual.blocks"]
    assert {block.place.stack for block in tiny.blocks(model)} == {"model.language_model.layers"}
    with torch.no_grad():
        assert model(input_ids=torch.full((2, 6), 7)).logits.isfinite().all()
    with pytest.raises(LamellaError, match=r"model\.visual\.blocks are given all images in one row"):
        tiny.molex(vision_language_model(), layers_to_transform=[0, 1], layers_pattern="visual.blocks")


UNFIT = {
    "tokens before sequences": (
        lambda: XLNetLMHeadModel(XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=24, vocab_size=tiny.VOCAB)),
        r"transformer\.layer\.0 maps states of shape \(5, 2, 16\), not \(batch, tokens, features\)",
    ),
    "stages of several widths": (
        lambda: SwinModel(SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2])),
        r"blocks of encoder\.layers are: config.*norms of widths \[8, 32\], \[16\]",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_blocks_that_no_other_could_stand_in_for_are_refused_when_they_are_asked_for(case: str) -> None:
    build, message = UNFIT[case]
    model = build().eval()
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(LamellaError, match=message):
        tiny.molex(model)
    assert [name for name, _ in model.named_parameters()] == before
    assert not tiny.blocks(model)


def test_tokens_that_a_model_adds_by_itself_are_not_taken_for_real_ones() -> None:
    config = BigBirdConfig(
        **TOWER, block_size=2, num_random_blocks=1, vocab_size=tiny.VOCAB, max_position_embeddings=24
    )
    model = tiny.molex(BigBirdModel(config).eval())
    ids = torch.full((3, 16), 7)
    with torch.no_grad():
        model(input_ids=ids)
        with pytest.raises(LamellaError, match=r"is given 16 tokens where the model was given 15.*pad_to_multiple_of"):
            model(input_ids=ids[:, :15])


def test_random_guests_of_a_speech_model_are_drawn_from_what_it_hears() -> None:
    config = WhisperConfig(
        d_model=16, encoder_layers=4, decoder_layers=4, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=tiny.VOCAB, num_mel_bins=4, max_source_positions=8,
        max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = tiny.molex(WhisperForConditionalGeneration(config).eval(), policy="random", lora=None)
    heard = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(0))
    chosen = []
    for sound in (heard, heard, heard.flip(0)):
        with torch.no_grad(), tiny.watch(model) as seen:
            model(input_features=sound, decoder_input_ids=torch.full((4, 5), 7))
        chosen.append(torch.stack([routing.indices[:, 0] for place, routing, _ in seen if "decoder" in place.stack]))
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2].flip(1)), "a sequence's draw is its own"
    assert len(set(map(tuple, chosen[0].T.tolist()))) > 1
