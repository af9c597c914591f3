"""Groups that choose LoRAs from a library for each sequence: retrieval picks a few of K, the router weighs those."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lamella.errors import LamellaError
from lamella.routing import Frame, Override, Sequences, pool_mean
from lamella.tuners.mole.config import MoleConfig
from lamella.tuners.mole.group import Group
from lamella.tuners.mole.plan import GroupPlan
from lamella.tuners.mole.router import RouterInputs
from lamella.tuners.mole.shared import SharedRouter
from lamella.tuners.mole.shelf import KeyTable, Shelf


def text_of(embedding: nn.Module, frame: Frame | None, read: Tensor, sequences: Sequences) -> Tensor | None:
    """Text embeddings of sequences, ``(S, features)``: each the mean of the model's embeddings of the tokens it reads.

    Args:
        embedding: of tokens.
        frame: the running stack's.
        read: which tokens those are, ``(batch, tokens)``.
        sequences: S of them.

    Returns:
        None where the stack is given other tokens than those, so that nothing says which they are.
    """
    given = None if frame is None else frame.given
    if given is None or given.shape[:2] != read.shape:
        return None
    embedded = given if given.is_floating_point() else embedding(given)  # (batch, tokens, features)
    return pool_mean(embedded.to(read.device).float().masked_fill(~read[..., None], 0), read, sequences)


class ShortlistGroup(Group):
    """A group of modules whose decision is for a shortlist: the logits of all other LoRAs are minus infinity.

    Args:
        plan: its modules.
        adapter: its name.
        config: its settings.
        names: the K LoRAs.
        decoder: whether its stack is causal.
        keys: scores of all K LoRAs.
        embedding: of tokens; needed where the keys are of texts.
    """

    def __init__(
        self,
        plan: GroupPlan,
        adapter: str,
        config: MoleConfig,
        names: Sequence[str],
        decoder: bool,
        keys: KeyTable,
        embedding: nn.Module | None,
    ) -> None:
        super().__init__(plan, adapter, config, names, decoder)
        self._keys, self._embedding = keys, embedding

    def router_inputs(self, override: Override, frame: Frame | None) -> RouterInputs:
        """What the router reads: the outputs of the LoRAs on each sequence's shortlist."""
        assert isinstance(self.router, SharedRouter)
        assert self.config.shortlist is not None
        stored = (member.lamella_mole_loras[self.adapter] for member in self.inputs)
        shelves = [one for one in stored if isinstance(one, Shelf)]  # all of them are
        texts = partial(self._texts, frame) if self._keys.of_texts else None
        return ShortlistedInputs(self.router, shelves, self._keys, self.config.shortlist, override.allowed, texts)

    @torch.no_grad()
    def _texts(self, frame: Frame | None, read: Tensor, sequences: Sequences) -> Tensor:
        """Text embeddings ``(S, features)`` of the sequences that decide."""
        assert self._embedding is not None
        found = text_of(self._embedding, frame, read, sequences)
        if found is None:
            raise LamellaError(
                f"{self.name} retrieves by text, and nothing says which text its tokens are: the model reads none, or "
                "puts other tokens beside it. Choose another retrieval key."
            )
        return found

    def without_decision(self, override: Override, like: Tensor) -> Tensor:
        """What runs without a decision has no shortlist, and so no LoRA, unless the shortlist is of all."""
        if self.config.shortlist == len(self.names):
            return super().without_decision(override, like)
        return torch.zeros_like(like)


class ShortlistedInputs:
    """The outputs of the LoRAs on a shortlist, which the mean of what a sequence may read decides on.

    Args:
        router: weighs them.
        shelves: the LoRAs in the matrices that are read.
        keys: scores of all K LoRAs.
        count: how many a sequence has on its shortlist.
        allowed: True for the LoRAs that are not left out, ``(K,)``; None for all.
        texts: from the tokens that are read and their sequences to text embeddings, which are scored in place of the
            input; None where the input is.
    """

    def __init__(
        self,
        router: SharedRouter,
        shelves: Sequence[Shelf],
        keys: KeyTable,
        count: int,
        allowed: Tensor | None,
        texts: Callable[[Tensor, Sequences], Tensor] | None = None,
    ) -> None:
        self._router, self._shelves, self._keys, self._count, self._allowed = router, shelves, keys, count, allowed
        self._texts = texts

    def by_token(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of modules that are given other rows than those of sequences, each row has a shortlist of its own."""
        rows = x.reshape(-1, x.shape[-1])
        return self._logits(rows, rows).view(*x.shape[:-1], -1), []

    def by_sequence(self, tokens: Tensor, read: Tensor, sequences: Sequences) -> Tensor:
        """Logits ``(S, K)``, minus infinity for the LoRAs that are not on a sequence's shortlist."""
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).masked_fill(~read[..., None], 0)
        pooled = pool_mean(wide, read, sequences)  # (S, in)
        return self._logits(pooled, pooled if self._texts is None else self._texts(read, sequences))

    def _logits(self, x: Tensor, asked: Tensor) -> Tensor:
        """From inputs ``(S, in)``, and what retrieval is asked with, to ``(S, K)``."""
        scores, count = self._keys.score(asked), self._count  # (S, K)
        if self._allowed is not None:
            allowed = self._allowed.to(scores.device)
            scores, count = scores.masked_fill(~allowed, -torch.inf), min(count, int(allowed.sum()))
        chosen = scores.topk(count, dim=-1).indices.sort(dim=-1).values  # (S, n)
        taken = [shelf.take(chosen, x.device) for shelf in self._shelves]
        h = [torch.einsum("si,snri->snr", x.to(A.dtype), A) for A, _ in taken]
        logits = self._router.of_chosen(
            h, [B.transpose(-1, -2) for _, B in taken], chosen.shape[:1], count, x.device
        )  # (S, n)
        return torch.full_like(scores, -torch.inf, dtype=logits.dtype).scatter(-1, chosen, logits)
