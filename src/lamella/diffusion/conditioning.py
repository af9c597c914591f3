"""What each kind of pipeline gives its denoiser beside the noised latents, with gradients into its text encoders."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lamella.errors import LamellaError

Conditioning = dict[str, Any]


def condition(pipe: Any, prompts: Sequence[str], latents: Tensor) -> Conditioning:
    """The denoiser's arguments for these prompts.

    Args:
        pipe: a StableDiffusionPipeline, StableDiffusionXLPipeline, PixArtAlphaPipeline or PixArtSigmaPipeline, or one
            derived from them.
        prompts: one per sample.
        latents: clean ones, ``(batch, channels, height, width)``; SDXL and PixArt are told the size of their images.

    Raises:
        LamellaError: another kind of pipeline.
    """
    for kind in type(pipe).__mro__:
        if kind.__name__ in _BY_PIPELINE:
            return _BY_PIPELINE[kind.__name__](pipe, list(prompts), latents)
    raise LamellaError(
        f"The losses here do not know how {type(pipe).__name__} conditions its denoiser; they know "
        f"{', '.join(_BY_PIPELINE)}. Give train_routers a loss of your own."
    )


def _stable_diffusion(pipe: Any, prompts: list[str], latents: Tensor) -> Conditioning:
    states, _ = pipe.encode_prompt(prompts, latents.device, 1, False)
    return {"encoder_hidden_states": states}


def _sdxl(pipe: Any, prompts: list[str], latents: Tensor) -> Conditioning:
    states, _, pooled, _ = pipe.encode_prompt(
        prompts, device=latents.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
    # Original size, the crop's corner, target size: an image that was neither scaled nor cropped.
    size = torch.tensor([height, width, 0, 0, height, width], dtype=states.dtype, device=latents.device)
    return {
        "encoder_hidden_states": states,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": size.expand(len(prompts), -1)},
    }


def _pixart(pipe: Any, prompts: list[str], latents: Tensor) -> Conditioning:
    length = min(pipe.tokenizer.model_max_length, _PIXART_LENGTH)
    states, mask, _, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, device=latents.device, max_sequence_length=length
    )
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if pipe.transformer.config.sample_size == _PIXART_SIZED:
        height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
        size = torch.tensor([[height, width]], dtype=states.dtype, device=latents.device)
        added["resolution"] = size.expand(len(prompts), -1)
        added["aspect_ratio"] = (size[:, :1] / size[:, 1:]).expand(len(prompts), -1)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask, "added_cond_kwargs": added}


# The tokens that PixArt-alpha's text encoder is given, and the size of latents at which its models are told an image's.
_PIXART_LENGTH = 120
_PIXART_SIZED = 128

_BY_PIPELINE: dict[str, Callable[[Any, list[str], Tensor], Conditioning]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _sdxl,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
}
