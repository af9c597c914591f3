"""The pipeline's denoiser: it has learnt to draw what a caption says, in the autoencoder's latents."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTokenizer, set_seed

from models.diffusion.autoencoder import SIDE, Components
from models.diffusion.captions import captions
from models.diffusion.text import token_ids
from models.diffusion.training import train
from models.diffusion.world import BASE, SIZE, render
from models.settings import DenoiserSettings


def scheduler() -> DDIMScheduler:
    """Noise by the squared cosine; the velocity is what is predicted, and drawing begins with nothing but noise."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def denoiser(settings: DenoiserSettings, latents: int, text_width: int) -> UNet2DConditionModel:
    """Untrained: a level of 8 x 8 places without text, and one of 4 x 4 and the middle with it."""
    return UNet2DConditionModel(
        sample_size=SIZE // SIDE,
        in_channels=latents,
        out_channels=latents,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=settings.widths,
        layers_per_block=1,
        norm_num_groups=settings.groups,
        attention_head_dim=settings.heads,  # which diffusers takes for the number of heads
        cross_attention_dim=text_width,
    )


def taught_denoiser(
    settings: DenoiserSettings,
    components: Components,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    file: Path,
    seed: int,
) -> tuple[UNet2DConditionModel, list[float]]:
    """A denoiser taught on scenes and kinds of the base world that are for training; the losses of its steps.

    Args:
        settings: its size, and how long it is taught.
        components: of the latents.
        tokenizer, encoder: what reads the captions, and is left as it is.
        file: where the training is kept on the way.
        seed: of its weights and all steps.
    """
    set_seed(seed)
    made = denoiser(settings, len(components.weights), encoder.config.hidden_size)
    noises = scheduler()

    def loss(generator: torch.Generator) -> Tensor:
        scenes = BASE.draw(settings.pace.batch_size, generator)
        untold = torch.rand(len(scenes), generator=generator) < settings.untold
        said = ["" if nothing else text for text, nothing in zip(captions(scenes, generator), untold, strict=True)]
        with torch.no_grad():
            told = encoder(token_ids(tokenizer, said)).last_hidden_state  # (scenes, 32, width)
        latents = components.latents(2 * render(scenes) - 1)  # (scenes, latents, 8, 8)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(noises.config.num_train_timesteps, (len(scenes),), generator=generator)
        found = made(noises.add_noise(latents, noise, times), times, encoder_hidden_states=told).sample
        return mse_loss(found, noises.get_velocity(latents, noise, times))

    return train(made, loss, settings.pace, file, seed)
