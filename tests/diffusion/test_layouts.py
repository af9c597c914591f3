"""LoRAs for diffusion transformers as other programs write them: one-hot weights are what diffusers makes of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from tests import tiny_pipelines as tiny
from tests.diffusion.test_pipeline_transformers import call_flux
from torch import Tensor, nn

from lamella import LamellaError, MoleConfig, compose_pipeline
from lamella.adapters import read_lora


def _tensor(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qwen() -> nn.Module:
    return QwenImageTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def call_qwen(model: nn.Module) -> Tensor:
    return model(
        hidden_states=_tensor(1, 4, 4), encoder_hidden_states=_tensor(1, 3, 8, seed=2),
        encoder_hidden_states_mask=torch.ones(1, 3).long(), timestep=torch.tensor([0.3]), img_shapes=[[(1, 2, 2)]],
        return_dict=False,
    )[0]  # fmt: skip


def z_image() -> nn.Module:
    return ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[2, 2, 4], axes_lens=[64, 16, 16],
    )  # fmt: skip


def call_z_image(model: nn.Module) -> Tensor:
    return model([_tensor(4, 1, 4, 4)], torch.tensor([0.3]), [_tensor(3, 8, seed=2)], return_dict=False)[0][0]


def wan() -> nn.Module:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def call_wan(model: nn.Module) -> Tensor:
    return model(_tensor(1, 4, 1, 4, 4), torch.tensor([3]), _tensor(1, 3, 8, seed=2), return_dict=False)[0]


def flux() -> nn.Module:
    return tiny.flux_transformer()


def pipeline(kind: str) -> Any:
    """A pipeline of the class that knows the names, with its transformer alone."""
    cls, make, _ = KINDS[kind]
    torch.manual_seed(0)
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    parts = dict.fromkeys(name for name in names if name in cls.__init__.__annotations__)
    return cls(**parts, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=make().eval())


KINDS: dict[str, tuple[Any, Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "flux": (FluxPipeline, flux, call_flux),
    "qwen": (QwenImagePipeline, qwen, call_qwen),
    "z-image": (ZImagePipeline, z_image, call_z_image),
    "wan": (WanPipeline, wan, call_wan),
}


def kohya(names: dict[str, tuple[int, int]], form: str = "{}") -> Iterator[tuple[str, Tensor]]:
    """Modules by name with their widths, as kohya's programs name factors and alphas."""
    for at, (name, (width, out)) in enumerate(names.items()):
        yield form.format(name) + ".lora_down.weight", _tensor(2, width, seed=3 * at)
        yield form.format(name) + ".lora_up.weight", _tensor(out, 2, seed=3 * at + 1)
        yield form.format(name) + ".alpha", torch.tensor(1.0 + at % 3)


def peft(names: dict[str, tuple[int, int]], form: str, alpha: bool = False, infix: str = "") -> dict[str, Tensor]:
    """The same as PEFT names factors, with or without an alpha beside them."""
    ending = {"lora_down.weight": f"lora_A{infix}.weight", "lora_up.weight": f"lora_B{infix}.weight", "alpha": "alpha"}
    named = {}
    for name, tensor in kohya(names, form):
        module, _, end = name.rpartition(".lora_") if "lora_" in name else name.rpartition(".")
        end = f"lora_{end}" if end != "alpha" else end
        if alpha or end != "alpha":
            named[f"{module}.{ending[end]}"] = tensor
    return named


ATTENTION = {"attn.to_q": (16, 16), "attn.to_v": (16, 16), "attn.to_out.0": (16, 16)}
FLUX_KOHYA = {
    "double_blocks_0_img_attn_qkv": (16, 48), "double_blocks_0_txt_attn_qkv": (16, 48),
    "double_blocks_0_img_mlp_0": (16, 64), "double_blocks_0_img_mod_lin": (16, 96),
    "single_blocks_1_linear2": (80, 16),
}  # fmt: skip
WAN = {
    f"blocks.{block}.{name}": (24, 24)
    for block in range(2)
    for name in [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
} | {f"blocks.{block}.ffn.{at}": widths for block in range(2) for at, widths in ((0, (24, 16)), (2, (16, 24)))}
QWEN = {f"transformer_blocks.0.{name}": widths for name, widths in ATTENTION.items()}
Z_IMAGE = {f"layers.{n}.attention.{part}": (16, 16) for n in range(2) for part in ("to_q", "to_v", "to_out.0")} | {
    "noise_refiner.0.feed_forward.w1": (16, 42), "layers.1.adaLN_modulation.0": (16, 64),
}  # fmt: skip


def flattened(names: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {name.replace(".", "_"): widths for name, widths in names.items()}


def xlabs() -> dict[str, Tensor]:
    shapes = {"double_blocks.0.processor.qkv_lora1": (16, 48), "double_blocks.0.processor.proj_lora2": (16, 16),
              "single_blocks.0.processor.qkv_lora": (16, 48)}  # fmt: skip
    named = kohya(shapes)
    return {name.replace("lora_down", "down").replace("lora_up", "up"): t for name, t in named if "alpha" not in name}


def wan_with_biases() -> dict[str, Tensor]:
    """As distilled Wan LoRAs come: with differences of biases, and of norms, for which diffusers has no place."""
    biases = {f"diffusion_model.{name}.diff_b": _tensor(out, seed=9) for name, (_, out) in WAN.items()}
    norm = {"diffusion_model.blocks.0.norm3.diff": _tensor(24), "diffusion_model.blocks.0.norm3.diff_b": _tensor(24)}
    return peft(WAN, "diffusion_model.{}") | biases | norm


LAYOUTS: dict[str, tuple[str, dict[str, Tensor]]] = {
    "flux of kohya": ("flux", dict(kohya(FLUX_KOHYA, "lora_unet_{}"))),
    "flux of XLabs": ("flux", xlabs()),
    "flux of an adapter by its name": ("flux", peft(QWEN, "transformer.{}", infix=".default_0")),
    "flux with alphas": ("flux", peft(QWEN, "transformer.{}", alpha=True)),
    "qwen of kohya": ("qwen", dict(kohya(flattened(QWEN), "lora_unet_{}"))),
    "qwen of ComfyUI": ("qwen", peft(QWEN, "diffusion_model.{}", alpha=True)),
    "qwen of PEFT's own names": ("qwen", peft(QWEN, "{}", infix=".default")),
    "z-image of kohya": ("z-image", dict(kohya(flattened(Z_IMAGE), "lora_unet_{}"))),
    "z-image of ComfyUI": ("z-image", peft(Z_IMAGE, "diffusion_model.{}")),
    "wan of musubi": ("wan", dict(kohya(flattened(WAN), "lora_unet_{}"))),
    "wan of ComfyUI": ("wan", peft(WAN, "diffusion_model.{}")),
    "wan with biases": ("wan", wan_with_biases()),
}


def written(layout: str, folder: Path) -> dict[str, Path]:
    """Two LoRAs: the layout's, and its half."""
    _, tensors = LAYOUTS[layout]
    for name, share in (("whole", 1.0), ("half", 0.5)):
        kept = {key: t.clone() if "alpha" in key else share * t for key, t in tensors.items()}
        save_file(kept, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("whole", "half")}


# One for each converter, with alphas and biases; the others are variations.
EACH_WAY = (
    "flux of kohya",
    "flux of XLabs",
    "flux with alphas",
    "flux of an adapter by its name",
    "qwen of kohya",
    "z-image of ComfyUI",
    "wan with biases",
)


@torch.no_grad()
@pytest.mark.parametrize(
    "layout", [one if one in EACH_WAY else pytest.param(one, marks=pytest.mark.heavy) for one in LAYOUTS]
)
def test_one_hot_weights_are_what_diffusers_makes_of_the_file(layout: str, tmp_path: Path) -> None:
    kind, _ = LAYOUTS[layout]
    call, loras = KINDS[kind][2], written(layout, tmp_path)
    plain = call(pipeline(kind).transformer)
    composition = compose_pipeline(pipeline(kind), loras)
    for name, path in loras.items():
        theirs = pipeline(kind)
        theirs.load_lora_weights(path)
        expected = call(theirs.transformer)
        assert (expected - plain).abs().max() > 1e-3
        with composition.fixed_weights({name: 1.0}):
            torch.testing.assert_close(call(composition.pipe.transformer), expected, rtol=1e-4, atol=2e-5)


def test_alphas_that_diffusers_would_leave_out_are_refused(tmp_path: Path) -> None:
    """Between names of kohya's kind and the pipeline's own, its converter loses them."""
    tensors = dict(kohya(QWEN, "transformer.{}"))
    ranks = {name: torch.tensor(2.0) if "alpha" in name else t for name, t in tensors.items()}
    results = []
    for name, file in (("own", tensors), ("ranks", ranks)):
        save_file(file, tmp_path / f"{name}.safetensors")
        theirs = pipeline("flux")
        theirs.load_lora_weights(tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            results.append(call_flux(theirs.transformer))
    assert torch.equal(*results)  # as if they were the rank

    with pytest.raises(LamellaError, match=r"alphas, such as transformer.*FluxPipeline.load_lora_weights leaves out"):
        read_lora(tmp_path / "own.safetensors", pipe=pipeline("flux"))
    assert read_lora(tmp_path / "ranks.safetensors", pipe=pipeline("flux")).skipped == ()


def test_what_diffusers_has_no_place_for_is_named(tmp_path: Path) -> None:
    composition = compose_pipeline(pipeline("wan"), written("wan with biases", tmp_path))
    assert "skipped whole: diffusion_model.blocks.0.norm3.diff: diffusers has no place for it" in str(composition)


def test_a_file_of_another_model_is_refused_with_the_class_that_could_not_read_it(tmp_path: Path) -> None:
    loras = written("wan of musubi", tmp_path)
    with pytest.raises(LamellaError, match="diffusers cannot read it for FluxPipeline"):
        compose_pipeline(pipeline("flux"), loras)
    loras = written("wan of ComfyUI", tmp_path)
    with pytest.raises(LamellaError, match="give its path to compose_pipeline"):
        compose_pipeline(pipeline("wan"), [read_lora(path) for path in loras.values()])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_called_left_out_where_gradients_are_off(mode: Callable[[], Any], tmp_path: Path) -> None:
    loras = written("flux of kohya", tmp_path)
    with mode():
        assert read_lora(loras["whole"], pipe=pipeline("flux")).skipped == ()


@pytest.mark.parametrize("form", ["lora_unet_{}", "lora_transformer_{}"])
def test_a_layout_that_diffusers_does_not_translate_is_named(form: str, tmp_path: Path) -> None:
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "transformer"))
    pipe = SanaPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler())
    save_file(dict(kohya(flattened(QWEN), form)), tmp_path / "lora.safetensors")
    with pytest.raises(LamellaError, match=r"kohya's names, such as lora_.*does not translate for SanaPipeline"):
        read_lora(tmp_path / "lora.safetensors", pipe=pipe)


@pytest.mark.parametrize("granularity", ["matrix", "sublayer", "block", "network"])
def test_blocks_are_found_by_what_they_are(granularity: str, tmp_path: Path) -> None:
    """Z-Image calls its attention otherwise than the others do."""
    loras = written("z-image of ComfyUI", tmp_path)
    config = MoleConfig(granularity=granularity, init_lora_weights=False, temperature=20.0, balance="none")
    composition = compose_pipeline(pipeline("z-image"), loras, config)
    groups = {
        group.name: [member.name for member in group.members] for group in composition.components["transformer"].groups
    }
    adaptive = "layers.1.adaLN_modulation.0"
    assert groups.pop(adaptive) == [adaptive]
    expected = {
        "matrix": len(Z_IMAGE) - 1, "sublayer": 3, "block": 3, "network": 1,
    }[granularity]  # fmt: skip
    assert len(groups) == expected
    if granularity == "block":
        assert set(groups) == {"layers.0", "layers.1", "noise_refiner.0"}
    call_z_image(composition.pipe.transformer).square().mean().backward()
    read = [group.router for group in composition.components["transformer"].groups if group.inputs]
    assert all(router.e.grad is not None for router in read)
