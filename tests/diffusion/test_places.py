"""Weights for each place of an image and each word, in pipelines."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tests import tiny_pipelines as tiny
from tests.diffusion.test_pipeline_transformers import CASES, as_pipeline, written
from tests.reference import mole_places
from tests.reference.mole_model import Unit
from torch import Tensor, nn

from lamella import LamellaError, MoleConfig, compose_pipeline, load_pipeline, record_routing
from lamella.adapters import map_to, read_lora
from lamella.diffusion import ImageBatch, PipelineComposition, denoising_loss, train_routers
from lamella.routing import find_tracker

PROMPTS = ["a cat", "a blue dog"]
NAMES = ("cat", "dog")
CONVOLUTIONS = ("conv1", "conv2", "conv", "conv_shortcut", "conv_in", "conv_out")
UNET = (*tiny.TARGETS["unet"], *CONVOLUTIONS)
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
OFF_ZERO = {"router_input": "token", "init_lora_weights": False, "temperature": 20.0, "balance": "none"}


def write(pipe: Any, folder: Path, seed: int) -> Path:
    """A LoRA of the UNet, its convolutions among them, and of the text encoders, by diffusers' writer."""
    layers: dict[str, Any] = {}
    for part, targets in (tiny.TARGETS | {"unet": UNET}).items():
        if isinstance(pipe.components.get(part), nn.Module):
            state, config = tiny.lora_of(getattr(pipe, part), targets, seed, rank=2 + seed)
            layers |= {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config}
    type(pipe).save_lora_weights(folder, **layers)
    return folder


class Case:
    """A kind of pipeline, its LoRAs, and diffusers' own pictures with them."""

    def __init__(self, make: Any, folder: Path) -> None:
        self.make = make
        self.loras = {name: write(make(), folder / name, seed) for seed, name in enumerate(NAMES)}
        self.theirs = make()
        for name, path in self.loras.items():
            self.theirs.load_lora_weights(path, adapter_name=name)

    def by_diffusers(self, weights: dict[str, float]) -> Tensor:
        self.theirs.set_adapters(list(weights), list(weights.values()))
        return tiny.run(self.theirs, PROMPTS)

    def composed(self, **config: Any) -> PipelineComposition:
        torch.manual_seed(1)
        return compose_pipeline(self.make(), self.loras, MoleConfig(**config))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tiny.stable_diffusion, tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module", params=["stable_diffusion", "sdxl"])
def case(request: pytest.FixtureRequest, sd: Case, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return sd if request.param == "stable_diffusion" else Case(tiny.sdxl, tmp_path_factory.mktemp("sdxl"))


def groups_of(composition: PipelineComposition) -> dict[str, Any]:
    return {f"{part}.{one.name}": one for part, own in composition.components.items() for one in own.groups}


def names_of(members: Iterable[Any]) -> list[str]:
    return [member.name for member in members]


def units_of(composition: PipelineComposition, component: str) -> list[Unit]:
    score = composition.config.score
    return [
        Unit(
            names_of(one.members),
            names_of(one.inputs),
            None if one.router.e is None else one.router.e.detach().double(),
            one.router.bias.detach().double(),
            float(torch.as_tensor(one.router.temperature()).detach()),
            one.router.scale,
            score,
        )
        for one in composition.components[component].groups
    ]


def deltas_of(model: nn.Module, loras: dict[str, Path]) -> dict[str, list[Any]]:
    """The K LoRAs of each module, A as a matrix, in float64."""
    found: dict[str, list[Any]] = {}
    for at, path in enumerate(loras.values()):
        for name, lora in map_to(model, read_lora(path)).modules.items():
            own = found.setdefault(name, [None] * len(loras))
            own[at] = (lora.A.flatten(1).double(), lora.B.flatten(1).double(), lora.scaling)
    return found


def as_double(folder: Path, into: Path) -> Path:
    """The same LoRA in float64, so that both forms compute in it."""
    (file,) = folder.glob("*.safetensors")
    into.mkdir()
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, into / "lora.safetensors")
    return into / "lora.safetensors"


@pytest.fixture(scope="module")
def unet_loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of few modules, each of another kind: convolutions of 3 x 3 (one with a stride), of 1 x 1, and linear maps."""
    folder, targets = (
        tmp_path_factory.mktemp("unet"),
        ("conv1", "conv", "conv_shortcut", "to_q", "to_k", "ff.net.0.proj"),
    )
    found = {}
    for seed, name in enumerate(NAMES):
        state, _ = tiny.lora_of(tiny.stable_diffusion().unet, targets[seed:], seed, rank=2 + seed)
        StableDiffusionPipeline.save_lora_weights(folder / name, unet_lora_layers=state)
        found[name] = as_double(folder / name, folder / f"{name} in double")
    return found


def call_unet(model: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    latents, words = (torch.randn(2, *shape, generator=g).double() for shape in ((4, 4, 4), (4, tiny.WIDTH)))
    return model(latents, timestep=torch.tensor([3, 9]), encoder_hidden_states=words).sample


@torch.no_grad()
@pytest.mark.parametrize(
    ("granularity", "score"),
    [("matrix", "softmax"), ("block", "sigmoid"), ("sublayer", "softmax"), ("network", "sigmoid")],
)
def test_each_place_is_the_sum_by_hand_in_convolutions_too(
    granularity: str, score: str, unet_loras: dict[str, Path]
) -> None:
    """Words and places of the blocks are four each, so that a shape alone would not tell them apart."""
    plain, model = (tiny.stable_diffusion().unet.double() for _ in range(2))
    config = MoleConfig(granularity=granularity, score=score, **OFF_ZERO)
    torch.manual_seed(2)
    composition = compose_pipeline(_unet_alone(model), unet_loras, config)
    deltas, units = deltas_of(plain, unet_loras), units_of(composition, "unet")
    for dropped in ([], [0]):
        with mole_places.composed(plain, deltas, units, dropped) as decided:
            expected = call_unet(plain)
        with composition.masked_experts([NAMES[at] for at in dropped]):
            torch.testing.assert_close(call_unet(model), expected)
        assert dropped or min(weights.std(dim=(0, 1)).max() for weights in decided.values()) > 1e-6
    assert (expected - call_unet(plain)).abs().max() > 1e-3


def _unet_alone(model: nn.Module) -> Any:
    pipe = tiny.stable_diffusion()
    pipe.unet = model
    return pipe


def test_of_a_block_its_places_decide_together_and_its_words(sd: Case) -> None:
    def of(granularity: str) -> dict[str, Any]:
        return groups_of(sd.composed(granularity=granularity, **OFF_ZERO))

    groups, prefix = of("block"), f"unet.{BLOCK}"
    words, places = groups[f"{prefix}.block of the words"], groups[prefix]
    assert names_of(words.members) == names_of(words.inputs) == [f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v"]
    assert len(places.members) == 8
    assert [name.removeprefix(f"{BLOCK}.") for name in names_of(places.inputs)] == [
        "attn1.to_q", "attn1.to_k", "attn1.to_v",
    ]  # fmt: skip
    assert {"unet.conv_in", "unet.down_blocks.0.resnets.0.conv1", "unet.down_blocks.0.resnets.0.time_emb_proj"} <= set(
        groups
    )
    sublayers = of("sublayer")
    assert names_of(sublayers[f"{prefix}.attn2"].members) == [f"{BLOCK}.attn2.to_q", f"{BLOCK}.attn2.to_out.0"]
    assert f"{prefix}.attn2 of the words" in sublayers
    lists = [
        "down_blocks.1.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
        "mid_block.attentions.0",
    ]
    found = [name for name in of("network") if "network" in name and name.startswith("unet")]
    assert sorted(found) == sorted(
        f"unet.{name}.transformer_blocks.network{rows}" for name in lists for rows in ("", " of the words")
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=5e-5)


def test_it_starts_at_the_mean_and_gates_at_the_sum(case: Case) -> None:
    for score, weight in (("softmax", 0.5), ("sigmoid", 1.0)):
        composition = case.composed(router_input="token", score=score)
        assert_close(tiny.run(composition.pipe, PROMPTS), case.by_diffusers(dict.fromkeys(NAMES, weight)))


@pytest.mark.parametrize("router_input", ["token", "mean"])
def test_routers_that_choose_one_lora_draw_its_picture_with_its_convolutions(router_input: str, case: Case) -> None:
    composition = case.composed(router_input=router_input, granularity="sublayer")
    layers = composition.components["unet"].layers.values()
    assert any(getattr(layer, "kernel_size", None) == (3, 3) for layer in layers)
    pictures = []
    for at, name in enumerate(NAMES):
        pictures.append(case.by_diffusers({name: 1.0}))
        for router in composition.routers().values():
            router.bias.data.copy_(torch.full((2,), -1e4).index_fill(0, torch.tensor(at), 1e4))
        assert_close(tiny.run(composition.pipe, PROMPTS), pictures[-1])
        with composition.fixed_weights({name: 1.0}):
            assert_close(tiny.run(composition.pipe, PROMPTS), pictures[-1])
    assert (pictures[0] - pictures[1]).abs().max() > 1e-2


# As kohya's trainers call some modules of SDXL, with the names of the original UNet.
OF_KOHYA = {
    "input_blocks_4_0_in_layers_2": "down_blocks.1.resnets.0.conv1",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_1_transformer_blocks_0_attn2_to_k": "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
}


@pytest.mark.parametrize("router_input", ["token", "mean"])
def test_convolutions_of_kohyas_files_are_composed(router_input: str, tmp_path: Path) -> None:
    def make() -> Any:
        pipe = tiny.sdxl()
        pipe.unet = _unet_of_three_levels()
        return pipe

    loras, unet = {}, make().unet
    for seed, name in enumerate(NAMES):
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for theirs, ours in OF_KOHYA.items():
            shape, key = unet.get_submodule(ours).weight.shape, f"lora_unet_{theirs}"
            tensors[f"{key}.lora_down.weight"] = 0.5 * torch.randn(2, *shape[1:], generator=generator)
            up = (shape[0], 2, *(1,) * (len(shape) - 2))
            tensors[f"{key}.lora_up.weight"] = 0.5 * torch.randn(up, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
        loras[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, loras[name])
    composition, plain = compose_pipeline(make(), loras, MoleConfig(router_input=router_input)), make()
    assert len(composition.components["unet"].layers) == len(OF_KOHYA)
    assert composition.skipped == ()
    plain.load_lora_weights(loras["dog"])
    with composition.fixed_weights({"dog": 1.0}):
        assert_close(tiny.run(composition.pipe, PROMPTS), tiny.run(plain, PROMPTS))


def _unet_of_three_levels() -> UNet2DConditionModel:
    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(8, 16, 16), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        cross_attention_dim=20, projection_class_embeddings_input_dim=30, addition_embed_type="text_time",
        addition_time_embed_dim=4,
    ).eval()  # fmt: skip


def test_a_place_decides_by_what_its_kernel_lies_on(sd: Case) -> None:
    composition = sd.composed(**OFF_ZERO)
    layer = composition.components["unet"].layers["conv_in"]
    x = tiny.latents(1)
    changed = x.clone()
    changed[:, :, 2, 5] += 1
    rows = [layer.rows("default", one) for one in (x, changed)]
    before, after = (layer.groups["default"].mixing_weights(layer, one, None)[0] for one in rows)
    assert before.shape == (1, 8, 8, 2)
    moved = (before != after).any(dim=-1)[0].nonzero()
    assert len(moved) == 9
    assert moved.amin(dim=0).tolist() == [1, 4]
    assert moved.amax(dim=0).tolist() == [3, 6]


def test_an_image_does_not_depend_on_the_others_of_its_batch_or_on_guidance(sd: Case) -> None:
    composition = sd.composed(top_k=1, **OFF_ZERO)
    together = tiny.run(composition.pipe, PROMPTS)
    alone = composition.pipe(
        PROMPTS[1:], latents=tiny.latents(2)[1:], num_inference_steps=2, guidance_scale=4.0,
        output_type="latent", height=16, width=16,
    ).images  # fmt: skip
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=5e-5)
    with composition.fixed_weights([{"cat": 1.0}, {"dog": 0.7}]):
        apart = tiny.run(composition.pipe, PROMPTS)
    with composition.fixed_weights({"dog": 0.7}):
        torch.testing.assert_close(apart[1], tiny.run(composition.pipe, PROMPTS)[1], rtol=1e-4, atol=5e-5)


def test_one_lora_at_most_counts_at_a_place(sd: Case) -> None:
    composition = sd.composed(top_k=1, score="sigmoid", **OFF_ZERO)
    seen: dict[str, tuple[torch.Size, Tensor]] = {}

    def observe(unit: Any, adapter: str, routing: Any, real: Any, shape: torch.Size) -> None:
        seen[unit.name] = shape, routing.dense_weights()

    tracker = find_tracker(composition.components["unet"].model)
    assert tracker is not None
    tracker.observers.append(observe)
    tiny.run(composition.pipe, PROMPTS, num_inference_steps=1, guidance_scale=1.0)
    assert seen[BLOCK][0] == (2, 16)
    assert seen[f"{BLOCK}.block of the words"][0] == (2, 16)
    assert seen["conv_in"][0] == (2, 8, 8)
    for _, weights in seen.values():
        assert set(weights.gt(0).sum(dim=-1).tolist()) == {1}
    assert any(weights.gt(0).any(dim=0).all() for _, weights in seen.values()), "not the same one at every place"


def test_the_trace_says_which_place_of_which_image_chose(sd: Case) -> None:
    composition = sd.composed(top_k=1, **OFF_ZERO)
    unet = composition.components["unet"].model
    with record_routing(unet, per_token=True) as trace:
        tiny.run(composition.pipe, PROMPTS, num_inference_steps=1, guidance_scale=1.0)
    tokens = trace.tokens
    for module, places in (("conv_in", 64), ("block", 16), ("block of the words", 16)):
        own = tokens[(tokens.module == module) & (tokens.layer == 0)]
        assert set(own.sequence) == {0, 1}, module
        assert set(own.position) == set(range(places)), module


@pytest.mark.parametrize("balance", ["log", "entropy"])
def test_routers_learn_with_any_balance(balance: str, sd: Case) -> None:
    composition = sd.composed(router_input="token", balance=balance)
    start = [parameter.clone() for parameter in composition.parameters()]
    log = train_routers(composition, denoising_loss, [ImageBatch(PROMPTS, tiny.latents(2))], 2, learning_rate=0.05)
    assert (log[-1].balance > 0) or balance != "log"
    moved = [not torch.equal(now, was) for now, was in zip(composition.parameters(), start, strict=True)]
    assert sum(moved) / len(moved) > 0.6


@pytest.mark.parametrize(
    "config", [{"router_input": "mean"}, {"granularity": "network", "score": "sigmoid"}], ids=["images", "places"]
)
def test_gradient_checkpointing_changes_no_gradient(config: dict[str, str], sd: Case) -> None:
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        composition = sd.composed(**OFF_ZERO | config)
        unet = composition.pipe.unet
        if checkpointed:
            unet.enable_gradient_checkpointing()
        composition.train()
        states = torch.randn(2, 5, tiny.WIDTH, generator=torch.Generator().manual_seed(1))
        predicted = unet(tiny.latents(2), timestep=torch.tensor([3, 9]), encoder_hidden_states=states).sample
        predicted.square().mean().backward()
        return {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_saved_and_loaded_it_is_bit_equal(sd: Case, tmp_path: Path) -> None:
    composition = sd.composed(score="sigmoid", **OFF_ZERO)
    picture = tiny.run(composition.pipe, PROMPTS)
    again = load_pipeline(tiny.stable_diffusion(), composition.save(tmp_path / "saved"))
    assert torch.equal(tiny.run(again.pipe, PROMPTS), picture)
    again.config.router_input = "mean"
    with pytest.raises(LamellaError, match="do not fit this pipeline"):
        load_pipeline(tiny.stable_diffusion(), again.save(tmp_path / "changed"))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "granularity"), [("sd3", "block"), ("flux", "network"), ("flux", "sublayer"), ("pixart", "block")]
)
def test_in_a_transformer_tokens_decide_for_themselves(kind: str, granularity: str, tmp_path: Path) -> None:
    """As by hand, so that no word is weighed by what an image's place has decided."""
    make, call, _ = CASES[kind]
    loras = written(kind, tmp_path)
    torch.manual_seed(2)
    model, plain = make(), make()
    composition = compose_pipeline(as_pipeline(model), loras, MoleConfig(granularity=granularity, **OFF_ZERO))
    deltas = {name: [_single(lora) for lora in own] for name, own in deltas_of(plain, loras).items()}
    units = units_of(composition, "transformer")
    for unit in units:
        unit.e, unit.bias = (None if unit.e is None else unit.e.float()), unit.bias.float()
    with mole_places.composed(plain, deltas, units):
        expected = call(plain)
    torch.testing.assert_close(call(model), expected, rtol=1e-3, atol=1e-4)
    of_words = [one for one in composition.components["transformer"].groups if "words" in one.name]
    assert of_words
    assert all(one.inputs for one in of_words)


def _single(lora: Any) -> Any:
    return None if lora is None else (lora[0].float(), lora[1].float(), lora[2])
