"""How often a pipeline draws what was said, by the judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from lamella.progress import counted
from models.diffusion.captions import captions
from models.diffusion.judge import UNCLEAR, Judge
from models.diffusion.training import seeded
from models.diffusion.world import BASE, NOTHING, Scenes
from models.settings import DrawingSettings

_AT_ONCE = 50  # pictures


@torch.no_grad()
def drawn(pipe: StableDiffusionPipeline, said: Sequence[str], settings: DrawingSettings, seed: int) -> Tensor:
    """A picture of each caption: ``(captions, 3, 32, 32)``, from 0 to 1; its noise depends on its place in the row."""
    channels, side = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    noise = torch.randn(len(said), channels, side, side, generator=seeded(seed, "drawing"))
    pipe.set_progress_bar_config(disable=True)
    parts = [
        pipe(
            list(said[start : start + _AT_ONCE]),
            latents=noise[start : start + _AT_ONCE].to(pipe.unet.dtype),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            output_type="pt",
        ).images.float()
        for start in counted(range(0, len(said), _AT_ONCE), "drawing", "rounds")
    ]
    return torch.cat(parts)


def rates(
    pipe: StableDiffusionPipeline, settings: DrawingSettings, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Of scenes that no training saw, for kinds that were trained and kinds that were not, by the number of objects.

    Returns:
        Shares: ``right`` of the pictures (every object, nothing else, and the background), ``objects`` of the objects,
        ``backgrounds`` of the pictures, and ``unclear`` of the places.
    """
    judge = Judge(BASE)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, kinds in {"trained": BASE.trained, "held_out": BASE.held_out}.items():
        table[name] = {}
        for objects in (1, 2, 3):
            generator = seeded(seed, "rates", name, objects)
            scenes = BASE.draw(settings.pictures, generator, objects=[objects], kinds=kinds, kept_out=True)
            pictures = drawn(pipe, captions(scenes, generator), settings, seed)
            table[name][str(objects)] = _shares(judge, pictures, scenes)
    return table


def _shares(judge: Judge, pictures: Tensor, scenes: Scenes) -> dict[str, float]:
    verdict = judge(pictures)
    shares: dict[str, Any] = {
        "right": verdict.right(scenes),
        "objects": verdict.places_right(scenes)[scenes.kinds != NOTHING],
        "backgrounds": verdict.backgrounds == scenes.backgrounds,
        "unclear": verdict.kinds == UNCLEAR,
    }
    return {name: values.double().mean().item() for name, values in shares.items()}
