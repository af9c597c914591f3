"""The pipeline's autoencoder: taught latents that are linear in a picture's pixels, and to draw the picture from them.

A denoiser learns such latents far sooner than those that an autoencoder finds by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import set_seed

from models.diffusion.judge import Judge
from models.diffusion.training import seeded, train
from models.diffusion.world import EVERYTHING, SIZE, render
from models.settings import AutoencoderSettings

SIDE = 4  # pixels of a patch, of which one latent place tells
_PICTURES = 3000  # whose patches the components are of


@dataclass(frozen=True, eq=False)
class Components:
    """The first principal components of patches of 4 x 4 pixels, the wide ones compressed.

    Attributes:
        mean: ``(48,)`` of a patch, of pixels from -1 to 1.
        weights: ``(latents, 48)``, orthogonal rows.
    """

    mean: Tensor
    weights: Tensor

    @classmethod
    def of_world(cls, latents: int, seed: int) -> Components:
        """Of pictures of everything; a component's deviation becomes its root, and the mean square of all is 1."""
        scenes = EVERYTHING.draw(_PICTURES, seeded(seed, "components"))
        patches = _patches(2 * render(scenes) - 1).flatten(0, 2)  # (patches, 48)
        mean = patches.mean(dim=0)
        variances, directions = torch.linalg.eigh((patches - mean).T.cov())  # ascending
        deviations = variances[-latents:].flip(0).sqrt()
        weights = directions[:, -latents:].flip(1).T / deviations.sqrt()[:, None]
        return cls(mean, weights / deviations.mean().sqrt())

    def latents(self, pictures: Tensor) -> Tensor:
        """Of pictures from -1 to 1: ``(pictures, 3, 32, 32)`` -> ``(pictures, latents, 8, 8)``."""
        return ((_patches(pictures) - self.mean) @ self.weights.T).movedim(3, 1)


def _patches(pictures: Tensor) -> Tensor:
    """``(pictures, 3, 32, 32)`` -> ``(pictures, 8, 8, 48)``."""
    patches = pictures.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE)  # (pictures, 3, 8, 8, 4, 4)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3)


def autoencoder(settings: AutoencoderSettings) -> AutoencoderKL:
    """Untrained; 32 x 32 pixels become 8 x 8 places of latents, of which it says one deviation whatever they are."""
    levels = len(settings.widths)
    made = AutoencoderKL(
        block_out_channels=settings.widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=settings.latents,
        norm_num_groups=settings.groups,
        sample_size=SIZE,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # no gradient comes here
        made.quant_conv.weight[settings.latents :] = 0
        made.quant_conv.bias[settings.latents :] = 2 * math.log(settings.noise)
    return made


def taught_autoencoder(
    settings: AutoencoderSettings, components: Components, file: Path, seed: int
) -> tuple[AutoencoderKL, list[float]]:
    """An autoencoder whose encoder gives these latents, and whose decoder draws from them; the losses of its steps."""
    set_seed(seed)
    made = autoencoder(settings)

    def loss(generator: torch.Generator) -> Tensor:
        pictures = 2 * render(EVERYTHING.draw(settings.pace.batch_size, generator)) - 1
        latents = components.latents(pictures)
        noisy = latents + settings.noise * torch.randn(latents.shape, generator=generator)
        decoding = mse_loss(made.decode(noisy).sample, pictures)
        return mse_loss(made.encode(pictures).latent_dist.mean, latents) + decoding

    return train(made, loss, settings.pace, file, seed)


@torch.no_grad()
def share_kept(made: AutoencoderKL, count: int, seed: int) -> dict[str, float]:
    """How many scenes that were kept out the judge still sees right once encoded and decoded, and the pixels' error."""
    judge, right, errors = Judge(EVERYTHING), [], []
    scenes = EVERYTHING.draw(count, seeded(seed, "decoding"), kinds=EVERYTHING.numbers, kept_out=True)
    for start in range(0, count, 64):
        part = scenes[start : start + 64]
        pictures = render(part)
        drawn = made.decode(made.encode(2 * pictures - 1).latent_dist.mean).sample / 2 + 0.5
        right.append(judge(drawn).right(part))
        errors.append((drawn - pictures).square().mean(dim=(1, 2, 3)))
    return {"right": torch.cat(right).double().mean().item(), "rmse": torch.cat(errors).mean().sqrt().item()}
