"""MOLE inside diffusion transformers: PixArt as a pipeline, SD3's and Flux's transformers alone."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import save_file
from tests import tiny_pipelines as tiny
from torch import Tensor, nn

from lamella import MoleConfig, compose_pipeline
from lamella.adapters import map_to, read_lora

NAMES = ("cat", "dog")
ALL = {
    "sd3": ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "to_out.0", "ff.net.0.proj", "ff.net.2",
            "ff_context.net.2", "norm1.linear", "proj_out", "context_embedder"),
    "flux": ("to_q", "to_k", "to_v", "add_v_proj", "to_out.0", "proj_mlp", "proj_out", "norm.linear", "norm1.linear",
             "ff.net.2", "ff_context.net.0.proj", "x_embedder", "timestep_embedder.linear_1"),
}  # fmt: skip


def call_sd3(model: nn.Module, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return model(
        hidden_states=torch.randn(2, 4, 8, 8, generator=g), encoder_hidden_states=torch.randn(2, 5, 8, generator=g),
        pooled_projections=torch.randn(2, 8, generator=g), timestep=torch.tensor([3.0, 70.0]),
    ).sample  # fmt: skip


def call_flux(model: nn.Module, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return model(
        hidden_states=torch.randn(2, 6, 4, generator=g), encoder_hidden_states=torch.randn(2, 5, 8, generator=g),
        pooled_projections=torch.randn(2, 8, generator=g), timestep=torch.tensor([0.1, 0.7]),
        img_ids=torch.zeros(6, 3), txt_ids=torch.zeros(5, 3),
    ).sample  # fmt: skip


def call_pixart(model: nn.Module, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return model(
        torch.randn(2, 4, 8, 8, generator=g), encoder_hidden_states=torch.randn(2, 5, 8, generator=g),
        timestep=torch.tensor([3, 30]), added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[str, ...]]] = {
    "sd3": (tiny.sd3_transformer, call_sd3, ALL["sd3"]),
    "flux": (tiny.flux_transformer, call_flux, ALL["flux"]),
    "pixart": (lambda: tiny.pixart().transformer, call_pixart, (*tiny.DIT_LORA, "to_k", "ff.net.0.proj")),
}


@pytest.fixture(params=list(CASES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(kind: str, folder: Path) -> dict[str, Path]:
    """Two LoRA files for a transformer, by diffusers' writer."""
    make, _, targets = CASES[kind]
    for at, name in enumerate(NAMES):
        state, config = tiny.lora_of(make(), targets, seed=at, rank=2 + at)
        StableDiffusion3Pipeline.save_lora_weights(
            folder / name, transformer_lora_layers=state, transformer_lora_adapter_metadata=config
        )
    return {name: folder / name for name in NAMES}


def as_pipeline(model: nn.Module) -> Any:
    return SimpleNamespace(components={"transformer": model})


def merged(kind: str, loras: dict[str, Path], weights: dict[str, float]) -> Tensor:
    """The transformer with the weighted LoRAs put into its matrices by hand."""
    make, call, _ = CASES[kind]
    model = make()
    for name, path in loras.items():
        for module, (A, B, scaling) in map_to(model, read_lora(path)).modules.items():
            model.get_submodule(module).weight.data += weights.get(name, 0.0) * scaling * (B @ A)
    return call(model)


@torch.no_grad()
def test_fixed_and_uniform_weights_are_those_of_merged_matrices(kind: str, tmp_path: Path) -> None:
    make, call, _ = CASES[kind]
    loras = written(kind, tmp_path)
    plain = call(make())
    model = make()
    composition = compose_pipeline(as_pipeline(model), loras)
    uniform = merged(kind, loras, dict.fromkeys(NAMES, 0.5))
    assert (uniform - plain).abs().max() > 1e-3
    torch.testing.assert_close(call(model), uniform, rtol=1e-4, atol=2e-5)
    for weights in ({"dog": 1.0}, {"cat": 0.3, "dog": 1.1}):
        with composition.fixed_weights(weights):
            torch.testing.assert_close(call(model), merged(kind, loras, weights), rtol=1e-4, atol=2e-5)
    composition.unload()
    assert torch.equal(call(model), plain)


@pytest.mark.parametrize("granularity", ["matrix", "sublayer", "block", "network"])
def test_routers_off_zero_run_and_get_gradients_in_every_granularity(
    kind: str, granularity: str, tmp_path: Path
) -> None:
    make, call, _ = CASES[kind]
    config = MoleConfig(granularity=granularity, init_lora_weights=False, temperature=20.0, balance="none")
    torch.manual_seed(0)
    model = make()
    composition = compose_pipeline(as_pipeline(model), written(kind, tmp_path), config)
    together = call(model)
    together.square().mean().backward()
    assert all(p.grad is not None for p in composition.parameters())
    other = call(model, seed=2)
    assert (together - other).abs().max() > 1e-4


def test_a_block_reads_its_normed_input_and_the_time_embedding_decides_for_itself(tmp_path: Path) -> None:
    make, _, _ = CASES["flux"]
    composition = compose_pipeline(as_pipeline(make()), written("flux", tmp_path))
    units = {unit.name: unit for unit in composition.components["transformer"].groups}
    block = "single_transformer_blocks.0"
    assert {r.name.removeprefix(f"{block}.") for r in units[block].inputs} == {
        "proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v",
    }  # fmt: skip
    assert [m.name for m in units[f"{block}.norm.linear"].members] == [f"{block}.norm.linear"]
    assert {"x_embedder", "transformer_blocks.0", "transformer_blocks.0.norm1.linear"} <= set(units)


def test_a_pipeline_with_a_diffusion_transformer_runs_as_before(tmp_path: Path) -> None:
    pipe = tiny.pixart()
    loras = {name: tiny.write_lora(pipe, tmp_path / name, at) for at, name in enumerate(NAMES)}
    plain = tiny.run(pipe, ["a cat"])
    composition = compose_pipeline(pipe, loras)
    assert (tiny.run(pipe, ["a cat"]) - plain).abs().max() > 1e-3
    composition.unload()
    assert torch.equal(tiny.run(pipe, ["a cat"]), plain)


def test_a_file_that_names_no_component_is_for_the_denoiser(tmp_path: Path) -> None:
    make, call, targets = CASES["sd3"]
    loras = written("sd3", tmp_path)
    state, _ = tiny.lora_of(make(), targets, seed=0, rank=2)
    save_file(state, tmp_path / "bare.safetensors")
    model = make()
    composition = compose_pipeline(as_pipeline(model), {"bare": tmp_path / "bare.safetensors", "dog": loras["dog"]})
    assert list(composition.components) == ["transformer"]
    with composition.fixed_weights({"dog": 1.0}):
        torch.testing.assert_close(call(model), merged("sd3", loras, {"dog": 1.0}), rtol=1e-4, atol=2e-5)
