"""Random noise on the tokens of a text and on their embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lamella.errors import LamellaError
from lamella.lab.robustness.embeddings import embedding_rms


def touched_tokens(ids: Tensor, mask: Tensor | None, special: Tensor) -> Tensor:
    """True for the tokens that noise may change, (N, T): real by the mask (N, T) and none of the special ids (S,)."""
    ordinary = ~torch.isin(ids, special.to(ids.device))
    return ordinary if mask is None else ordinary & mask.bool()


def row_generator(seed: int, row: int) -> np.random.Generator:
    """The random numbers of one row: numpy's on the CPU, so that they are the same on every device."""
    return np.random.default_rng((seed, row))


def gaussian_noise(embeddings: Tensor, touched: Tensor, rows: Sequence[int], sigma: float, seed: int) -> Tensor:
    """What to add to the embeddings of a batch: N(0, (sigma·rms)²) on touched tokens and 0 elsewhere, in float32.

    Args:
        embeddings: what the embedding module gives for the ids, (N, T, H).
        touched: the tokens to change, (N, T).
        rows: number of each sequence in its split, N of them.
        sigma: standard deviation relative to the rms over that sequence's own touched embeddings.
        seed: of the noise.

    Raises:
        LamellaError: sigma is negative.
    """
    if not sigma >= 0.0:
        raise LamellaError(f"sigma={sigma} is no standard deviation. Give 0 or more, relative to the embeddings' rms.")
    noise = torch.zeros(embeddings.shape, device=embeddings.device)  # (N, T, H)
    for at, row in enumerate(rows):
        own = embeddings[at, touched[at]]  # (n, H)
        draw = torch.from_numpy(row_generator(seed, row).standard_normal(tuple(own.shape), np.float32))
        noise[at, touched[at]] = sigma * embedding_rms(own) * draw.to(own.device)
    return noise


def replaced_tokens(
    ids: Tensor,
    touched: Tensor,
    rows: Sequence[int],
    probability: float,
    seed: int,
    vocabulary: npt.NDArray[np.int64],
) -> Tensor:
    """The ids (N, T) with each touched one replaced, with the given probability, by another of the vocabulary.

    The tokens replaced at a probability are among those replaced at a greater one, by the same tokens.

    Args:
        ids: of the batch, (N, T).
        touched: the tokens that may be replaced, (N, T).
        rows: number of each sequence in its split, N of them.
        probability: of each touched token, on its own.
        seed: of the noise.
        vocabulary: ids to draw from evenly, in ascending order, (V,): all but special ones.

    Raises:
        LamellaError: the probability is outside 0..1, or there is no other token to draw.
    """
    if not 0.0 <= probability <= 1.0:
        raise LamellaError(f"{probability} is no probability of replacing a token. Give a number from 0 to 1.")
    if len(vocabulary) < 2:
        raise LamellaError(
            f"The vocabulary has {len(vocabulary)} token(s) that are not special, so none can be replaced by another."
        )
    replaced = ids.clone()
    for at, row in enumerate(rows):
        own = ids[at, touched[at]].cpu().numpy()  # (n,)
        generator = row_generator(seed, row)
        chance, drawn = generator.random(len(own)), generator.integers(len(vocabulary) - 1, size=len(own))
        other = vocabulary[drawn + (drawn >= np.searchsorted(vocabulary, own))]  # never the token itself
        replaced[at, touched[at]] = torch.from_numpy(np.where(chance < probability, other, own)).to(ids)
    return replaced
