"""From a block's input to the guests it mixes in, with their weights. Plain torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lamella.routing import (
    ProjectedCosineRouter,
    Router,
    Routing,
    Rows,
    Sequences,
    count_votes,
    make_router,
    pool_mean,
)
from lamella.routing.router import Granularity
from lamella.tuners.molex.config import MolexConfig


class Chosen(NamedTuple):
    """One of the guests at a block.

    Attributes:
        guest: its block index.
        rows: of the batch in which something chose it, ``(R,)``; None where every row has.
        share: its weight, ``(batch, tokens or 1, 1)``.
    """

    guest: int
    rows: Tensor | None
    share: Tensor


@dataclass(frozen=True)
class Choice:
    """The guests at one block, for the sequences of a batch.

    Attributes:
        indices: block indices, ``(batch, k)``, or ``(batch, tokens, k)`` where each token or document has its own.
        weights: how much each guest counts, of the same shape; the k of them sum to 1 in value.
        without: tokens that run without guest, ``(batch, tokens)``; None where there are none.
        routing: the decision as it was taken, over all blocks of the stack, for who watches; None where nobody
            does, or it was taken in an earlier forward.
        real: which of the routing's rows decide for something real; None for all.
        scores: what the balance loss reads, log scores of the candidates, ``(rows, candidates)``; None without router.
        picked: the candidates chosen, by their place among the candidates, ``(rows, k)``.
        extent: by how many first tokens it was taken (``Readable.extent``), ``(batch, 2)``; None where in an earlier
            forward.
        everywhere: the guests' block indices where all sequences have the same; None where they may differ.
    """

    indices: Tensor
    weights: Tensor
    without: Tensor | None = None
    routing: Routing | None = None
    real: Tensor | None = None
    scores: Tensor | None = None
    picked: Tensor | None = None
    extent: Tensor | None = None
    everywhere: tuple[int, ...] | None = None

    @property
    def guests(self) -> list[Chosen]:
        """Those that were chosen, in the order of the blocks, the block itself among them."""
        if self.everywhere is None:
            return self._found
        return [Chosen(guest, None, self._share(guest)) for guest in sorted(self.everywhere)]

    @cached_property
    def _found(self) -> list[Chosen]:
        guests = []
        for guest in torch.unique(self.indices).tolist():
            chosen_by = (self.indices == guest).flatten(1).any(dim=1)  # (batch,)
            rows = None if bool(chosen_by.all()) else chosen_by.nonzero()[:, 0]
            guests.append(Chosen(guest, rows, self._share(guest)))
        return guests

    def _share(self, guest: int) -> Tensor:
        """A guest's weight, ``(batch, tokens or 1, 1)``."""
        share = (self.weights * (self.indices == guest)).sum(dim=-1)  # (batch,) or (batch, tokens)
        share = share if share.dim() == 2 else share[:, None]
        return (share if self.without is None else share.masked_fill(self.without, 0))[..., None]

    def to(self, device: torch.device) -> "Choice":
        """The same with what the mixture needs on another device."""
        if self.indices.device == self.weights.device == device:
            return self
        without = None if self.without is None else self.without.to(device)
        return replace(self, indices=self.indices.to(device), weights=self.weights.to(device), without=without)


def score_candidates(logits: Tensor, candidates: Sequence[int], score: str) -> Tensor:
    """Each token's score of each candidate.

    Args:
        logits: of all blocks of the stack, ``(batch, tokens, T)``.
        candidates: the blocks that can be chosen.
        score: "softmax" over them, or a "sigmoid" for each.

    Returns:
        ``(batch, tokens, candidates)``, each between 0 and 1.
    """
    among = logits if len(candidates) == logits.shape[-1] else logits[..., list(candidates)]
    return torch.sigmoid(among) if score == "sigmoid" else torch.softmax(among, dim=-1)


def pool_scores(
    scores: Tensor, read: Tensor, sequences: Sequences, granularity: str
) -> tuple[Tensor, Tensor, Sequences]:
    """Lays out tokens by the decisions that read them.

    Args:
        scores: ``(batch, tokens, C)``.
        read: the tokens a decision reads, ``(batch, tokens)``.
        sequences: the sequences in these rows.
        granularity: "sequence", "batch" or "token".

    Returns:
        Scores ``(rows, tokens per row, C)`` with zeros where nothing is read, the same mask laid out alike, and the
        decisions as sequences of these rows.
    """
    if granularity == "batch":
        scores, read, sequences = scores.flatten(0, 1)[None], read.flatten()[None], Rows(1)
    elif granularity == "token":
        scores, read, sequences = scores.flatten(0, 1)[:, None], read.flatten()[:, None], Rows(read.numel())
    # Masked, not multiplied: what attention makes of padding need not be finite.
    return scores.masked_fill(~read[..., None], 0), read, sequences


def choose(scores: Tensor, read: Tensor, sequences: Sequences, top_k: int, aggregate: str) -> tuple[Tensor, Tensor]:
    """The best candidates of each decision.

    Args:
        scores: ``(rows, tokens, C)``.
        read: ``(rows, tokens)``.
        sequences: D of them in these rows, each of which decides.
        top_k: how many.
        aggregate: by the "mean" score of the tokens, or by the "mode" of their own choices (the most frequent ones).

    Returns:
        Their places among the candidates, best first, ``(D, k)``, ties to the smallest; and all mean scores,
        ``(D, C)``.
    """
    mean = pool_mean(scores, read, sequences)  # (D, C)
    with torch.no_grad():
        by = mean if aggregate == "mean" else count_votes(scores.argmax(dim=-1), scores.shape[-1], read, sequences)
        picked = by.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return picked, mean


def guest_weights(probs: Tensor, form: str) -> Tensor:
    """Weights of the chosen guests, which also carry the router's gradient.

    In value they are the scores renormalised, so exactly 1 for a single guest. The gradient is that of s times them,
    where s has value 1 and is ``P / stopgrad(P)`` ("scale") or ``1 + P - stopgrad(P)`` ("straight-through") of their
    total score P, or has none ("none").

    Args:
        probs: scores of the chosen, ``(rows, k)``.
        form: how the gradient gets there.
    """
    probs = probs.clamp_min(torch.finfo(probs.dtype).tiny)  # a sequence without real tokens has scores of 0
    total = probs.sum(dim=-1, keepdim=True)
    weights = probs / total
    if form == "none":
        return weights.detach()
    held = total.detach()
    return weights * (total / held if form == "scale" else 1 + (total - held))


def as_routing(
    logits: Tensor, picked: Tensor, weights: Tensor, candidates: Sequence[int], total: int, granularity: str
) -> Routing:
    """A decision among some candidates as one among all blocks of the stack, for who watches.

    Args:
        logits: ``(rows, C)`` of the candidates.
        picked: ``(rows, k)`` places among them.
        weights: ``(rows, k)``.
        candidates: C block indices.
        total: T, the blocks of the stack.
        granularity: what a row decides for.
    """
    places = torch.as_tensor(candidates, device=logits.device)
    everywhere = logits.detach().new_full((len(logits), total), -torch.inf)
    everywhere[:, places] = logits.detach()
    return Routing(everywhere, weights.detach(), places[picked], cast(Granularity, granularity))


def spread(rows: Tensor, batch: int, tokens: int, sequences: Sequences, granularity: str) -> Tensor:
    """A value per decision ``(rows, k)`` as one per row of the batch ``(batch, k)`` or token ``(batch, tokens, k)``."""
    if granularity == "batch":
        return rows.expand(batch, -1)
    if granularity == "token":
        return rows.view(batch, tokens, -1)
    return sequences.spread(rows) if sequences.packed else rows


def draw(tokens: Tensor, sequences: Sequences, depth: int, seed: int, candidates: int, granularity: str) -> Tensor:
    """A random number for each candidate of each decision, by a hash of what the sequence reads.

    It depends on nothing else: not on the other sequences, the padding, the device or the order of calls.

    Args:
        tokens: what ``hash_tokens`` makes of them, ``(batch, tokens)``.
        sequences: the sequences in these rows.
        depth: the block's index.
        seed: of the policy.
        candidates: C.
        granularity: "sequence", "batch" or "token".

    Returns:
        ``(rows, C)`` of int64, at least 0.
    """
    if granularity == "token":
        value = tokens.flatten()
    else:
        value = sequences.total(tokens)
        value = value.sum(dim=0, keepdim=True) if granularity == "batch" else value
    which = torch.arange(candidates, device=tokens.device)
    keyed = _mix(_mix(value + _mix(torch.tensor(seed, device=tokens.device)))[:, None] + (depth << 20) + which)
    return _mix(keyed) & 0x7FFFFFFFFFFFFFFF


def hash_tokens(given: Tensor | None, read: Tensor, sequences: Sequences, before: Tensor | None = None) -> Tensor:
    """A hash of each token and its place among those of its sequence that are read.

    Args:
        given: token ids ``(batch, tokens)``, or embeddings or pixels ``(batch, ...)``.
        read: the tokens that count, ``(batch, tokens)``.
        sequences: the sequences in these rows.
        before: a hash of what each sequence has read elsewhere, ``(batch,)``.

    Returns:
        ``(batch, tokens)`` of int64, 0 for tokens that are not read.
    """
    content = _content(given, read)
    place = sequences.running(read.long())  # the same token counts for something else elsewhere, padding for nothing
    value = _mix(content) + _mix(place + 1)
    if before is not None:
        value = value + before.to(read.device)[:, None]
    return _mix(value).masked_fill(~read, 0)


def hash_sequences(given: Tensor, mask: Tensor | None) -> Tensor:
    """A hash of each whole sequence, ``(batch,)`` of int64.

    Args:
        given: token ids ``(batch, tokens)``, or embeddings or pixels ``(batch, ...)``.
        mask: True for real tokens, ``(batch, tokens)``; None when all are real. Pixels have none.
    """
    if mask is None or given.shape[:2] != mask.shape:
        tokens = given.shape[1] if given.dim() < 4 else 1
        mask = torch.ones(given.shape[0], tokens, dtype=torch.bool, device=given.device)
    return hash_tokens(given, mask, Rows(len(mask))).sum(dim=1)


def _content(given: Tensor | None, read: Tensor) -> Tensor:
    if given is None:
        return torch.zeros_like(read, dtype=torch.int64)
    given = given.to(read.device)
    if given.is_floating_point():
        bits = given.detach().float().view(torch.int32).long()
        is_by_token = bits.dim() < 4 and bits.shape[:2] == read.shape
        per_token = bits.view(*read.shape, -1) if is_by_token else bits.flatten(1)[:, None]
        given = _mix(per_token + _mix(torch.arange(per_token.shape[-1], device=read.device))).sum(dim=-1)
    if given.shape[0] == read.shape[0] and given.shape[-1] in (1, read.shape[1]):
        return given.long().expand_as(read)
    return torch.zeros_like(read, dtype=torch.int64)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in int64 that wraps around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def decides_for_something(read: Tensor, sequences: Sequences, granularity: str) -> Tensor | None:
    """Which decisions have a real token to read, ``(rows,)``."""
    if granularity == "batch":
        return None
    return read.flatten() if granularity == "token" else sequences.total(read.long()) > 0


def new_router(config: MolexConfig, width: int, blocks: int) -> Router:
    """A router before training, which scores so many blocks by states of a width."""
    if config.router_proj is not None:
        return ProjectedCosineRouter(width, blocks, config.router_proj)
    router = make_router(config.router, width, blocks, bias=config.router == "linear")
    if config.router == "linear":
        nn.init.normal_(router.weight, std=0.02)  # as published
    return router
