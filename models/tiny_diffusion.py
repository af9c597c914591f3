"""`tiny-diffusion`: a small Stable Diffusion pipeline, trained from scratch on rendered scenes, and judged exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline

from models.building import Clock, Made
from models.diffusion.autoencoder import Components, share_kept, taught_autoencoder
from models.diffusion.denoiser import scheduler, taught_denoiser
from models.diffusion.rates import rates
from models.diffusion.text import share_read, taught_reader, word_tokenizer
from models.diffusion.training import curve, refuse_others
from models.settings import TinyDiffusionSettings


def make_tiny_diffusion(settings: TinyDiffusionSettings, stages: Path) -> Made:
    """Teach text encoder, autoencoder and denoiser one after another, and count what the pipeline draws right.

    Args:
        settings: of the parts.
        stages: the folder that keeps each part on the way, from which an interrupted training goes on.

    Raises:
        LamellaError: the folder keeps a training with other settings, or what cannot be read.
    """
    refuse_others(stages, settings.model_dump(mode="json", exclude={"drawing", "promised"}))
    clock, seed, tokenizer = Clock(), settings.seed, word_tokenizer()
    losses: dict[str, list[float]] = {}
    with clock.part("text"):
        reader, losses["text"] = taught_reader(settings.text, tokenizer, stages / "text.safetensors", seed)
    components = Components.of_world(settings.autoencoder.latents, seed)
    with clock.part("autoencoder"):
        vae, losses["autoencoder"] = taught_autoencoder(
            settings.autoencoder, components, stages / "autoencoder.safetensors", seed
        )
    encoder = reader.encoder.requires_grad_(False)
    with clock.part("denoiser"):
        unet, losses["denoiser"] = taught_denoiser(
            settings.denoiser, components, tokenizer, encoder, stages / "denoiser.safetensors", seed
        )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (vae, encoder, unet):
        part.half().float()  # figures are those of the weights that are kept
    with clock.part("rates"):
        shares = {
            "captions_read": share_read(reader, tokenizer, settings.drawing.pictures, seed),
            "pictures_kept": share_kept(pipe.vae, settings.drawing.pictures, seed),
            "rates": rates(pipe, settings.drawing, seed),
        }
    log = {
        **shares,
        "parameters": {name: getattr(pipe, name).num_parameters() for name in ("text_encoder", "vae", "unet")},
        "seconds": clock.seconds,
        "curves": {part: curve(values) for part, values in losses.items()},
    }
    for part in (vae, encoder, unet):
        part.half()
    # Opened without a word on precision, diffusers' parts come in single precision; transformers' as their config says.
    files = {"text_encoder/config.json": {**encoder.config.to_diff_dict(), "dtype": "float32"}}
    return Made(pipe, None, log, _failed(log, settings), {"rates.json": shares["rates"], **files})


def _failed(log: dict[str, Any], settings: TinyDiffusionSettings) -> list[str]:
    """What the pipeline should be and is not."""
    failed = []
    for objects, promised in settings.promised.items():
        share = log["rates"]["trained"][str(objects)]["right"]
        if share < promised:
            failed.append(
                f"Pictures with {objects} objects are right in {share:.1%}; the recipe promises {promised:.1%}."
            )
    return failed
