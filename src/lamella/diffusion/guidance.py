"""CLIP's judgement of a composed image as a loss: MOLE's unsupervised domain loss for images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lamella.diffusion.clip import embed_images, embed_texts, text_alignment
from lamella.diffusion.denoising import decode, denoise
from lamella.errors import LamellaError


@dataclass(frozen=True, eq=False)
class ClipGuidance:
    """Global and local guidance by CLIP; called like ``denoising_loss``.

    Global: one minus the cosine of the whole image and its prompt. Local: one minus the cosine of each concept's name
    and whichever of some random square patches shows it best, averaged over the concepts, so that each has to be
    somewhere.

    MOLE (arXiv 2404.13628) names local and global CLIP guidance as its loss for images and leaves open which images are
    judged, what a patch is compared with, its size, and the weights. Its released code judges the image after each
    remaining step of a sampler, without gradients from one step to the next; adds to the global term a change of
    direction from a concept's own picture; switches its patches off; and takes the logarithm of the sum. Chosen here:
    the image that one prediction at a random time implies, whose gradient passes the denoiser once as theirs does;
    patches against the concepts' names, which needs no pictures; the plain sum.

    Args:
        clip: a CLIPModel, which stays frozen.
        tokenizer: its tokenizer.
        concepts: what has to be in the images, in words.
        local: the weight of the local term; the global one has weight 1.
        patches: how many are drawn for each image.
        patch_share: a patch's side over that of the image.
    """

    clip: Any
    tokenizer: Any
    concepts: Sequence[str]
    local: float = 1.0
    patches: int = 4
    patch_share: float = 0.5

    def __post_init__(self) -> None:
        if not self.concepts or self.local < 0 or self.patches < 1 or not 0 < self.patch_share <= 1:
            raise LamellaError(
                "CLIP guidance needs at least one concept, a weight of at least 0, a patch or more and a share from 0 "
                f"to 1; here {len(self.concepts)} concepts, local={self.local}, patches={self.patches}, "
                f"patch_share={self.patch_share}."
            )

    def __call__(self, pipe: Any, prompts: Sequence[str], latents: Tensor, generator: Generator) -> Tensor:
        """The loss of one prediction for noised latents; arguments as for ``denoising_loss``."""
        images = decode(pipe, denoise(pipe, prompts, latents, generator).clean)
        return self.judge(images, prompts, generator)

    def judge(self, images: Tensor, prompts: Sequence[str], generator: Generator) -> Tensor:
        """The loss of images ``(batch, 3, H, W)`` from 0 to 1, a scalar."""
        whole = 1 - text_alignment(embed_images(self.clip, images), self._texts(prompts))  # (batch,)
        if self.local == 0:
            return whole.mean()
        shown = embed_images(self.clip, self._patches(images, generator))  # (batch * patches, D)
        cosines = (shown @ self._texts(self.concepts).t()).view(len(images), self.patches, -1)
        return whole.mean() + self.local * (1 - cosines.amax(dim=1)).mean()

    def _texts(self, texts: Sequence[str]) -> Tensor:
        tokens: Mapping[str, Tensor] = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return embed_texts(self.clip, tokens["input_ids"], tokens["attention_mask"])

    def _patches(self, images: Tensor, generator: Generator) -> Tensor:
        """Random squares, an image's own next to each other: ``(batch * patches, 3, side, side)``."""
        height, width = images.shape[-2:]
        side = max(1, round(self.patch_share * min(height, width)))
        cut = []
        for image in images:
            tops = torch.randint(height - side + 1, (self.patches,), generator=generator).tolist()
            lefts = torch.randint(width - side + 1, (self.patches,), generator=generator).tolist()
            cut += [image[:, t : t + side, s : s + side] for t, s in zip(tops, lefts, strict=True)]
        return torch.stack(cut)
