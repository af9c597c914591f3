"""Tiny random diffusers pipelines of real classes, built in memory without a download, and LoRA files for them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from examples.tiny_stable_diffusion import (
    TEXT_LORA,
    UNET_LORA,
    WIDTH,
    clip,
    lora_of,
    quiet,
    scheduler,
    stable_diffusion,
    text_config,
    tokenizer,
    unet,
    vae,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

__all__ = ["clip", "lora_of", "stable_diffusion", "tokenizer"]

DIT_LORA = ("to_q", "to_v", "to_out.0", "ff.net.2", "proj_out", "adaln_single.linear")


def sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "transformer_layers_per_block": (1, 2)}
    denoiser = unet(2 * WIDTH + 4, True, projection_class_embeddings_input_dim=6 * 4 + 6, **more)
    return quiet(
        StableDiffusionXLPipeline(
            vae=vae(), text_encoder=CLIPTextModel(text_config()).eval(),
            text_encoder_2=CLIPTextModelWithProjection(text_config(WIDTH + 4)).eval(), tokenizer=tokenizer(),
            tokenizer_2=tokenizer(), unet=denoiser.eval(), scheduler=scheduler(), add_watermarker=False,
        )
    )  # fmt: skip


def pixart(seed: int = 0, told_size: bool = False) -> PixArtAlphaPipeline:
    """As PixArt-alpha; its models of 1024 pixels are told an image's size."""
    torch.manual_seed(seed)
    heads = 3 if told_size else 2
    transformer = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=128 if told_size else 8, cross_attention_dim=8 * heads, caption_channels=WIDTH, norm_num_groups=4,
        patch_size=2,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(tokenizer()), d_model=WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return quiet(
        PixArtAlphaPipeline(
            tokenizer=tokenizer(), text_encoder=T5EncoderModel(t5).eval(), vae=vae(), transformer=transformer.eval(),
            scheduler=scheduler(),
        )
    )  # fmt: skip


def sd3_transformer() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip


def flux_transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


TARGETS = {
    "unet": UNET_LORA,
    "transformer": DIT_LORA,
    "text_encoder": TEXT_LORA,
    "text_encoder_2": (*TEXT_LORA, "text_projection"),
}


def write_lora(pipe: Any, folder: Path, seed: int, rank: int = 2, parts: tuple[str, ...] = ()) -> Path:
    """One LoRA file for a pipeline, by diffusers' own writer; B is random, so that it does something.

    The pipeline is only read: the LoRA is taken off it again.
    """
    states: dict[str, Any] = {}
    for part in parts or [name for name in TARGETS if isinstance(pipe.components.get(name), nn.Module)]:
        model = getattr(pipe, part)
        if part.startswith("text_encoder") and isinstance(model, T5EncoderModel):
            continue
        states[part] = lora_of(model, TARGETS[part], seed, rank)
    layers = {f"{part}_lora_layers": state for part, (state, _) in states.items()}
    metadata = {f"{part}_lora_adapter_metadata": config for part, (_, config) in states.items()}
    writer = type(pipe) if hasattr(pipe, "save_lora_weights") else StableDiffusion3Pipeline  # PixArt has none
    writer.save_lora_weights(folder, **layers, **metadata)
    return folder


def latents(batch: int, seed: int = 5) -> Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def run(pipe: Any, prompts: list[str], seed: int = 5, **more: Any) -> Tensor:
    """The latents of images of these prompts, two steps, with guidance."""
    given = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent", "height": 16, "width": 16}
    if isinstance(pipe, PixArtAlphaPipeline):
        given |= {"max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False}
    return pipe(prompts, latents=latents(len(prompts), seed), **given | more).images
