"""The loss that diffusion models are trained with, of the kind that the pipeline's scheduler says.

Prompts are encoded here, by each kind of pipeline in its way, so that gradients reach the text encoders.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lamella.errors import LamellaError

Conditioning = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Denoised:
    """One prediction of a denoiser.

    Attributes:
        prediction: of the noise, or of the velocity, ``(batch, channels, height, width)``.
        target: what it should be, of the same shape.
        clean: the clean latents that follow from the prediction, of the same shape.
    """

    prediction: Tensor
    target: Tensor
    clean: Tensor


def denoising_loss(pipe: Any, prompts: Sequence[str], latents: Tensor, generator: Generator) -> Tensor:
    """Mean squared error of the predicted noise (or velocity) at one random time per sample.

    ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps``; the target is ``eps``, or ``v = sqrt(a_t) eps - sqrt(1 - a_t) x_0``
    where the scheduler's ``prediction_type`` is "v_prediction" (Salimans and Ho 2022), as it is for SD 2.1.

    Args:
        pipe: a pipeline, composed or not; see ``condition`` for the kinds.
        prompts: one per sample.
        latents: clean ones as the VAE gives them, times its scaling factor, ``(batch, channels, height, width)``.
        generator: draws times and noise, on the CPU, so that a seed means the same everywhere.

    Returns:
        A scalar.

    Raises:
        LamellaError: another kind of pipeline, or a scheduler that predicts something else.
    """
    denoised = denoise(pipe, prompts, latents, generator)
    return torch.nn.functional.mse_loss(denoised.prediction.float(), denoised.target.float())


def denoise(pipe: Any, prompts: Sequence[str], latents: Tensor, generator: Generator) -> Denoised:
    """Noises latents to a random time each, and lets the pipeline's denoiser predict, once."""
    kind, alphas = _schedule(pipe)
    times = torch.randint(len(alphas), (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    kept = alphas[times].sqrt()[:, None, None, None].to(latents)  # sqrt(a_t)
    spread = (1 - alphas[times]).sqrt()[:, None, None, None].to(latents)  # sqrt(1 - a_t)
    noised = kept * latents + spread * noise
    prediction = _predict(pipe, prompts, noised, times.to(latents.device))
    if kind == "epsilon":
        return Denoised(prediction, noise, (noised - spread * prediction) / kept)
    return Denoised(prediction, kept * noise - spread * latents, kept * noised - spread * prediction)


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Images from latents, ``(batch, 3, H, W)`` from 0 to 1, with gradients into the latents."""
    decoded: Tensor = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


def _schedule(pipe: Any) -> tuple[str, Tensor]:
    """What the denoiser predicts, and a_t for every time."""
    kind = pipe.scheduler.config.get("prediction_type")
    alphas = getattr(pipe.scheduler, "alphas_cumprod", None)
    if kind not in ("epsilon", "v_prediction") or alphas is None:
        raise LamellaError(
            f"{type(pipe.scheduler).__name__} with prediction_type={kind!r} has no denoising loss here: it is for "
            "'epsilon' and 'v_prediction' with cumulative alphas, and not for flow matching. Give train_routers a loss "
            "of your own."
        )
    return kind, alphas


def _predict(pipe: Any, prompts: Sequence[str], noised: Tensor, times: Tensor) -> Tensor:
    denoiser = pipe.components.get("unet") or pipe.components["transformer"]
    conditioning = condition(pipe, prompts, noised)
    predicted: Tensor = denoiser(noised, timestep=times, **conditioning).sample
    # A diffusion transformer may predict the variance as well, which its sampler does not use.
    return predicted.chunk(2, dim=1)[0] if predicted.shape[1] == 2 * noised.shape[1] else predicted


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
