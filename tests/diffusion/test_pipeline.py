"""MOLE inside diffusers pipelines: what it computes, against diffusers' own ``set_adapters``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tests import tiny_pipelines as tiny
from torch import Tensor, nn

from lamella import MoleConfig, compose_pipeline
from lamella.diffusion import PipelineComposition
from lamella.routing import find_tracker

NAMES = ("cat", "dog", "ink")
PROMPTS = ["a cat", "a blue dog"]
# Random routers have large logits: a high temperature keeps every LoRA in play.
OFF_ZERO = MoleConfig(init_lora_weights=False, temperature=20.0)


class Case:
    """One kind of pipeline with three LoRAs of different ranks: composed, and with diffusers' own adapters."""

    def __init__(self, make: Callable[[], Any], folder: Path) -> None:
        self.make = make
        source = make()
        self.loras = {name: tiny.write_lora(source, folder / name, at, 1 + at) for at, name in enumerate(NAMES)}
        self.plain = tiny.run(source, PROMPTS)
        self.theirs = make()
        for name, path in self.loras.items():
            self.theirs.load_lora_weights(path, adapter_name=name)

    def by_diffusers(self, weights: dict[str, float]) -> Tensor:
        self.theirs.set_adapters(list(weights), list(weights.values()))
        return tiny.run(self.theirs, PROMPTS)

    def composed(self, config: MoleConfig | None = None) -> PipelineComposition:
        torch.manual_seed(7)
        return compose_pipeline(self.make(), self.loras, config)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tiny.stable_diffusion, tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module", params=["stable_diffusion", "sdxl"])
def case(request: pytest.FixtureRequest, sd: Case, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return sd if request.param == "stable_diffusion" else Case(tiny.sdxl, tmp_path_factory.mktemp("sdxl"))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def watch(composition: PipelineComposition, component: str = "unet") -> dict[str, list[Tensor]]:
    """The weights of every decision that is taken from now on, in the order of the LoRAs: by unit, one per call."""
    seen: dict[str, list[Tensor]] = {}

    def observe(unit: Any, adapter: str, routing: Any, real: Any, shape: Any) -> None:
        weights = torch.zeros(len(routing.weights), len(composition.names))
        seen.setdefault(unit.name, []).append(weights.scatter(1, routing.indices, routing.weights.detach()))

    tracker = find_tracker(composition.components[component].model)
    assert tracker is not None
    tracker.observers.append(observe)
    return seen


def test_the_loras_do_something_and_each_something_else(case: Case) -> None:
    alone = [case.by_diffusers({name: 1.0}) for name in NAMES]
    for at, one in enumerate([case.plain, *alone]):
        for other in alone[at:]:
            assert (one - other).abs().max() > 1e-2


def test_untrained_routers_weigh_all_alike_as_diffusers_does_with_weights_one_over_k(case: Case) -> None:
    composition = case.composed()
    assert_close(tiny.run(composition.pipe, PROMPTS), case.by_diffusers(dict.fromkeys(NAMES, 1 / 3)))


@pytest.mark.parametrize("granularity", ["matrix", "sublayer", "block", "network"])
def test_every_granularity_begins_at_the_uniform_mean(sd: Case, granularity: str) -> None:
    composition = sd.composed(MoleConfig(granularity=granularity))
    assert_close(tiny.run(composition.pipe, PROMPTS), sd.by_diffusers(dict.fromkeys(NAMES, 1 / 3)))


def test_one_hot_weights_are_that_lora_alone(case: Case) -> None:
    composition = case.composed(OFF_ZERO)
    for name in NAMES:
        with composition.fixed_weights({name: 1.0}):
            assert_close(tiny.run(composition.pipe, PROMPTS), case.by_diffusers({name: 1.0}))


def test_any_fixed_weights_are_those_of_set_adapters(sd: Case) -> None:
    composition = sd.composed()
    for weights in ((0.0, 0.0, 0.0), (0.25, 0.0, 1.0), (1.2, 0.6, 0.05)):
        named = dict(zip(NAMES, weights, strict=True))
        with composition.fixed_weights(named):
            assert_close(tiny.run(composition.pipe, PROMPTS), sd.by_diffusers(named))


def test_weights_per_image_are_each_images_own_with_and_without_guidance(sd: Case) -> None:
    composition = sd.composed()
    wanted: list[dict[str, float]] = [{"cat": 1.0}, {"dog": 0.7, "ink": 0.2}]
    for scale in (1.0, 4.0):
        with composition.fixed_weights(wanted):
            together = tiny.run(composition.pipe, PROMPTS, guidance_scale=scale)
        for at, weights in enumerate(wanted):
            with composition.fixed_weights(weights):
                assert_close(together[at], tiny.run(composition.pipe, PROMPTS, guidance_scale=scale)[at])


def test_a_mask_redistributes_in_proportion_in_every_router(case: Case) -> None:
    """At the first router that runs, whose input is the same with and without the mask."""
    composition = case.composed(OFF_ZERO)
    for component in composition.components:
        seen = watch(composition, component)
        tiny.run(composition.pipe, PROMPTS, num_inference_steps=1)
        first = next(iter(seen))
        before = seen[first][0]
        with composition.masked_experts(["dog"]):
            seen.clear()
            tiny.run(composition.pipe, PROMPTS, num_inference_steps=1)
        kept = before * torch.tensor([1.0, 0.0, 1.0])
        if not component.startswith("unet"):  # whose prompts were encoded with a mask, so that its input differs
            torch.testing.assert_close(seen[first][0], kept / kept.sum(dim=-1, keepdim=True))
        for decisions in seen.values():
            for weights in decisions:
                assert (weights[:, 1] == 0).all()
                torch.testing.assert_close(weights.sum(dim=-1), torch.ones(len(weights)))


def test_with_all_but_one_masked_that_one_is_alone(case: Case) -> None:
    composition = case.composed(OFF_ZERO)
    with composition.masked_experts(["cat", "ink"]):
        assert_close(tiny.run(composition.pipe, PROMPTS), case.by_diffusers({"dog": 1.0}))
    outside = tiny.run(composition.pipe, PROMPTS)
    assert (outside - case.by_diffusers({"dog": 1.0})).abs().max() > 1e-3


def test_routers_off_zero_tell_prompts_and_latents_apart(case: Case) -> None:
    composition = case.composed(OFF_ZERO)
    seen = watch(composition)
    tiny.run(composition.pipe, PROMPTS, num_inference_steps=1, guidance_scale=1.0)
    tiny.run(composition.pipe, PROMPTS, seed=6, num_inference_steps=1, guidance_scale=1.0)
    tiny.run(composition.pipe, ["zzz", "a"], num_inference_steps=1, guidance_scale=1.0)
    blocks = {name: decisions for name, decisions in seen.items() if "transformer_blocks" in name}
    assert blocks
    for latents, other_latents, _ in blocks.values():
        assert (latents[0] - latents[1]).abs().max() > 1e-6
        assert (latents - other_latents).abs().max() > 1e-6
    assert max((b[0] - b[2]).abs().max() for b in blocks.values()) > 1e-6, "the prompt is read through the image"


def test_with_guidance_each_row_decides_for_itself(sd: Case) -> None:
    composition = sd.composed(OFF_ZERO)
    seen = watch(composition)
    tiny.run(composition.pipe, PROMPTS, num_inference_steps=1)
    name = next(name for name in reversed(seen) if "transformer_blocks" in name)
    (weights,) = seen[name]
    assert len(weights) == 4
    assert (weights[:2] - weights[2:]).abs().max() > 1e-6


def test_an_image_does_not_depend_on_the_others_of_its_batch(case: Case) -> None:
    composition = case.composed(OFF_ZERO)
    together = tiny.run(composition.pipe, PROMPTS)
    alone = composition.pipe(
        PROMPTS[1:], latents=tiny.latents(2)[1:], num_inference_steps=2, guidance_scale=4.0,
        output_type="latent", height=16, width=16,
    ).images  # fmt: skip
    assert_close(together[1:], alone)


def test_a_block_has_one_router_that_reads_what_its_self_attention_is_given(sd: Case) -> None:
    units = {unit.name: unit for unit in sd.composed().components["unet"].groups}
    stack = "down_blocks.1.attentions.0.transformer_blocks"
    block = units[f"{stack}.0"]
    assert [reader.name.removeprefix(f"{stack}.0.") for reader in block.inputs] == [
        "attn1.to_q", "attn1.to_k", "attn1.to_v",
    ]  # fmt: skip
    assert len(block.members) == 3 + 1 + 3 + 1 + 2
    assert "down_blocks.1.attentions.0.proj_in" in units
    sublayers = {unit.name: unit for unit in sd.composed(MoleConfig(granularity="sublayer")).components["unet"].groups}
    assert [r.name.rpartition("0.")[2] for r in sublayers[f"{stack}.0.attn2"].inputs] == ["attn2.to_q"]
    assert [r.name for r in sublayers[f"{stack}.0.mlp"].inputs] == [f"{stack}.0.ff.net.0.proj"]


def test_one_router_for_the_network_serves_every_block(sd: Case) -> None:
    composition = sd.composed(MoleConfig(granularity="network", init_lora_weights=False, temperature=20.0))
    seen = watch(composition)
    tiny.run(composition.pipe, PROMPTS, num_inference_steps=1)
    assert [name for name in seen if "transformer_blocks" in name] == [
        "down_blocks.1.attentions.0.transformer_blocks.network"
    ]


def test_1x1_convolutions_are_composed_as_linear_maps_of_their_channels(sd: Case) -> None:
    composition = sd.composed(OFF_ZERO)
    name = "down_blocks.1.attentions.0.proj_in"
    layer = composition.components["unet"].layers[name]
    conv = layer.get_base_layer()
    assert isinstance(conv, nn.Conv2d)
    x = torch.randn(2, 16, 3, 5)
    loras = layer.loras("default")
    weights = layer.groups["default"].mixing_weights(layer, x.movedim(1, -1), None)[0]
    assert weights.shape == (2, 3)
    expected = []
    for row, own in zip(x, weights, strict=True):
        scale = own.repeat_interleave(torch.tensor(loras.ranks))
        delta = (loras.B * scale) @ loras.A
        expected.append(conv(row[None])[0] + torch.einsum("oi,ihw->ohw", delta, row))
    torch.testing.assert_close(layer(x), torch.stack(expected))


def test_3x3_convolutions_are_composed_as_diffusers_has_them(tmp_path: Path) -> None:
    targets, loras = ("conv1", "conv", "conv_shortcut", "conv_out", "to_q"), {}
    for seed, name in enumerate(("cat", "dog")):
        state, config = tiny.lora_of(tiny.stable_diffusion().unet, targets, seed=seed, rank=2)
        loras[name] = tmp_path / name
        StableDiffusionPipeline.save_lora_weights(
            loras[name], unet_lora_layers=state, unet_lora_adapter_metadata=config
        )
    plain = tiny.run(tiny.stable_diffusion(), PROMPTS)
    composition = compose_pipeline(tiny.stable_diffusion(), loras, OFF_ZERO)
    for name, path in loras.items():
        theirs = tiny.stable_diffusion()
        theirs.load_lora_weights(path)
        expected = tiny.run(theirs, PROMPTS)
        assert (expected - plain).abs().max() > 1e-2
        with composition.fixed_weights({name: 1.0}):
            assert_close(tiny.run(composition.pipe, PROMPTS), expected)
    composition.unload()
    assert torch.equal(tiny.run(composition.pipe, PROMPTS), plain)


def test_unloading_restores_the_pipeline_bit_for_bit(case: Case) -> None:
    pipe = case.make()
    models = [pipe.components[name] for name in ("unet", "text_encoder")]
    modules = [dict(model.named_modules()) for model in models]
    flags = [[p.requires_grad for p in model.parameters()] for model in models]
    states = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    composition = compose_pipeline(pipe, case.loras, OFF_ZERO)
    assert not torch.equal(tiny.run(pipe, PROMPTS), case.plain)
    composition.unload()
    assert torch.equal(tiny.run(pipe, PROMPTS), case.plain)
    for model, before, wanted, state in zip(models, modules, flags, states, strict=True):
        assert dict(model.named_modules()) == before
        assert [p.requires_grad for p in model.parameters()] == wanted
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        assert find_tracker(model) is None
    compose_pipeline(pipe, case.loras)  # and it can be composed again


def test_only_routers_train_and_they_are_float32_in_a_half_precision_pipeline(sd: Case) -> None:
    pipe = sd.make()
    pipe.unet.to(torch.bfloat16)
    composition = compose_pipeline(pipe, sd.loras)
    trained = [p for model in (pipe.unet, pipe.text_encoder) for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in composition.parameters()}
    assert {p.dtype for p in trained} == {torch.float32}


def test_what_was_composed_is_said(sd: Case) -> None:
    said = str(sd.composed())
    assert "MOLE of 3 LoRAs: " in said
    assert "LoRAs by number: 0 cat, 1 dog, 2 ink" in said
    assert "unet: 52 modules, 16 routers" in said
    assert "text_encoder: 6 modules, 2 routers" in said
    assert "time_emb_proj" in said


def test_only_the_best_lora_of_each_sample_is_used(sd: Case) -> None:
    composition = sd.composed(MoleConfig(init_lora_weights=False, temperature=20.0, top_k=1))
    for component in composition.components:
        seen = watch(composition, component)
        tiny.run(composition.pipe, PROMPTS, num_inference_steps=1)
        assert {own.max().item() for decisions in seen.values() for own in decisions} == {1.0}
        assert all(torch.equal(own.sum(dim=-1), torch.ones(len(own))) for one in seen.values() for own in one)
    for unit in (unit for own in composition.components.values() for unit in own.groups):
        unit.router.e.data.zero_()
        unit.router.bias.data.copy_(torch.tensor([0.0, 1.0, 0.0]))
    assert_close(tiny.run(composition.pipe, PROMPTS), sd.by_diffusers({"dog": 1.0}))


def test_routers_are_in_the_mode_of_their_model(sd: Case) -> None:
    """A pipeline generates in evaluation mode, where routers pay nothing."""
    composition = sd.composed()
    routers = [unit.owner for own in composition.components.values() for unit in own.groups]
    assert not any(leader.training for leader in routers)
    composition.train()
    assert all(leader.training for leader in routers)
