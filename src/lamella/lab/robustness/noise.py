"""Noise on what a model reads: on input embeddings, on tokens, and the worst that an attack finds.

The published noise protocol of MoLEx is unknown; this one is lamella's. Noise changes real, non-special tokens
alone. What a row is given follows from the seed and the row's number, never from its batch, the padding or the model,
so that every method is scored on the same noise; and a stronger noise is the weaker one made larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lamella.errors import LamellaError


def input_embeddings(model: nn.Module) -> nn.Module:
    """The module that turns the ids of the input text into vectors; of an encoder-decoder model, the encoder's.

    Raises:
        LamellaError: the model has none.
    """
    reader: Any = model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        reader = reader.get_encoder()  # a separate module, even where its weight is shared with the decoder's
    try:
        embeddings = reader.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    if not isinstance(embeddings, nn.Module):
        raise LamellaError(
            f"{type(model).__name__} says nothing of its input embeddings (get_input_embeddings), so no noise can be "
            "put on them. Use a transformers model of text, with or without a PEFT adapter."
        )
    return embeddings


@contextmanager
def changed_embeddings(model: nn.Module, shape: tuple[int, int], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """For one forward inside the context, the input embeddings are what ``change`` makes of them.

    It is a hook on the embedding module and not `inputs_embeds`: models that number their positions by the ids
    (RoBERTa, MPNet) or pool the last real token by them (decoders that classify) still see the ids. Prompt tuning looks
    the text up in the same module and puts its virtual tokens in front of the result, so those stay as they are.

    Args:
        model: a transformers model, with or without a PEFT adapter.
        shape: (N, T) of the ids that the model reads; the first lookup of that shape is changed, later ones are not.
        change: from embeddings (N, T, H) to the same shape and dtype.

    Raises:
        LamellaError: the forward ended without such a lookup.
    """
    done = False

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal done
        if done or output.shape[:-1] != shape:
            return None
        done = True
        return change(output)

    handle = input_embeddings(model).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not done:
        raise LamellaError(
            f"{type(model).__name__} did not look up input ids of shape {tuple(shape)} in the module that "
            "get_input_embeddings names, so the noise never reached it. Give the model input_ids, not inputs_embeds."
        )


def embedding_rms(embeddings: Tensor) -> Tensor:
    """Root mean square over the entries of one sequence's touched tokens (n, H), a scalar in float32; 0 without any."""
    return embeddings.detach().float().square().mean().sqrt() if embeddings.numel() else torch.zeros(())


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
        sigma: standard deviation relative to the rms over that sequence's touched embeddings.
        seed: of the noise.

    Raises:
        LamellaError: sigma is negative.
    """
    if not sigma >= 0.0:
        raise LamellaError(
            f"sigma={sigma} is not a standard deviation. Give 0 or more, relative to the embeddings' rms."
        )
    noise = torch.zeros(embeddings.shape, device=embeddings.device)  # (N, T, H)
    for at, row in enumerate(rows):
        entries = embeddings[at, touched[at]]  # (n, H)
        draw = torch.from_numpy(row_generator(seed, row).standard_normal(tuple(entries.shape), np.float32))
        noise[at, touched[at]] = sigma * embedding_rms(entries) * draw.to(entries.device)
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
        probability: of each touched token, independently.
        seed: of the noise.
        vocabulary: ids to draw from evenly, in ascending order, (V,): all but special ones.

    Raises:
        LamellaError: the probability is outside 0..1, or there is no other token to draw.
    """
    if not 0.0 <= probability <= 1.0:
        raise LamellaError(f"{probability} is not a probability of replacing a token. Give a number from 0 to 1.")
    if len(vocabulary) < 2:
        raise LamellaError(
            f"The vocabulary has {len(vocabulary)} token(s) that are not special, so none can be replaced by another."
        )
    replaced = ids.clone()
    for at, row in enumerate(rows):
        tokens = ids[at, touched[at]].cpu().numpy()  # (n,)
        generator = row_generator(seed, row)
        chance, drawn = generator.random(len(tokens)), generator.integers(len(vocabulary) - 1, size=len(tokens))
        other = vocabulary[drawn + (drawn >= np.searchsorted(vocabulary, tokens))]  # never the token itself
        replaced[at, touched[at]] = torch.from_numpy(np.where(chance < probability, other, tokens)).to(ids)
    return replaced


def pgd(
    losses: Callable[[Tensor], Tensor],
    embeddings: Tensor,
    touched: Tensor,
    rows: Sequence[int],
    radius: float,
    seed: int,
    *,
    steps: int = 10,
    step_size: float | None = None,
) -> Tensor:
    """The perturbation (N, T, H) in float32 with the highest loss met on the way of an attack from a random start.

    A sequence's ball has an L2 radius of ``radius`` times the norm of its touched embeddings, which is the expected
    size of Gaussian noise with sigma = radius. Each step goes along the sequence's normalised gradient, then back
    into the ball. No perturbation at all is one of the candidates, so the loss of no row falls. Of a routed model the
    gradient is that of the experts chosen; a choice has none, so the attack finds no more than a lower bound of what
    can be done to it.

    Args:
        losses: the loss of every sequence (N,) under a perturbation (N, T, H), each a function of its part of it.
            The model has to be in evaluation mode; parameters get no gradient.
        embeddings: what the embedding module gives for the ids, (N, T, H).
        touched: the tokens that may change, (N, T).
        rows: number of each sequence in its split, N of them; seed and row decide the random start.
        radius: relative to the norm of a sequence's touched embeddings.
        seed: of the random start.
        steps: gradient steps.
        step_size: in radii; 2.5 / steps by default, so that every point of the ball can be reached.

    Raises:
        LamellaError: the radius is negative, there are no steps, or the loss does not depend on the perturbation.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018; in embedding space as in
        Miyato et al., Adversarial Training Methods for Semi-Supervised Text Classification, 2017.
    """
    if not radius >= 0.0 or steps < 1:
        raise LamellaError(f"An attack needs a radius of 0 or more and at least 1 step, not {radius} and {steps}.")
    inside = touched[..., None].float()  # (N, T, 1)
    limit = radius * _norm(embeddings.detach().float() * inside)  # (N, 1, 1)
    stride = limit * (2.5 / steps if step_size is None else step_size)
    delta = _random_start(embeddings, touched, rows, seed) * limit
    with torch.no_grad():
        best, highest = torch.zeros_like(delta), losses(torch.zeros_like(delta))
    for _ in range(steps):
        value, gradient = _loss_and_gradient(losses, delta)
        best, highest = _higher(best, highest, delta, value)
        delta = delta + stride * _unit(gradient * inside)
        delta = delta * (limit / _norm(delta).clamp_min(1e-30)).clamp_max(1.0)
    with torch.no_grad():
        return _higher(best, highest, delta, losses(delta))[0]


def _loss_and_gradient(losses: Callable[[Tensor], Tensor], delta: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        delta = delta.detach().requires_grad_()
        value = losses(delta)  # (N,)
        if not value.requires_grad:
            raise LamellaError("The loss does not depend on the embeddings' perturbation, so it cannot be attacked.")
        # a sequence's loss depends on its entries alone, so the gradient of the sum holds that of each
        (gradient,) = torch.autograd.grad(value.sum(), delta)
    return value.detach(), gradient


def _higher(best: Tensor, highest: Tensor, delta: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    better = value > highest  # (N,)
    return torch.where(better[:, None, None], delta, best), torch.where(better, value, highest)


def _random_start(embeddings: Tensor, touched: Tensor, rows: Sequence[int], seed: int) -> Tensor:
    """A point drawn evenly from the unit ball of each sequence's touched entries, (N, T, H)."""
    start = torch.zeros(embeddings.shape, device=embeddings.device)
    for at, row in enumerate(rows):
        shape = embeddings[at, touched[at]].shape  # (n, H)
        generator = row_generator(seed, row)
        direction = torch.from_numpy(generator.standard_normal(tuple(shape), np.float32))
        # the volume of a ball grows with its radius to the power of its dimension
        reach = generator.random() ** (1.0 / max(1, shape.numel()))
        start[at, touched[at]] = (direction / direction.norm().clamp_min(1e-30) * reach).to(start.device)
    return start


def _norm(entries: Tensor) -> Tensor:
    return entries.flatten(1).norm(dim=1)[:, None, None]  # (N, 1, 1)


def _unit(entries: Tensor) -> Tensor:
    return entries / _norm(entries).clamp_min(1e-30)
