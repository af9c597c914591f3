"""What a language model has to beat: how often a token occurs, and how often it follows the one before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bigrams:
    """Counts of tokens and of pairs of neighbours.

    Attributes:
        single: how often each token occurs, ``(V,)``.
        pairs: how often the second follows the first, ``(V, V)``.
    """

    single: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, blocks: Tensor, vocabulary: int) -> Bigrams:
        """Counted in ``blocks``, ``(B, T)``; a pair never spans two blocks."""
        flat = blocks[:, :-1] * vocabulary + blocks[:, 1:]  # (B, T-1)
        pairs = torch.bincount(flat.flatten(), minlength=vocabulary**2).view(vocabulary, vocabulary)
        return cls(torch.bincount(blocks.flatten(), minlength=vocabulary).double(), pairs.double())

    def unigram_nll(self, blocks: Tensor) -> Tensor:
        """Negative log-probability of all tokens but a block's first by their frequency, each seen once more."""
        return -self._unigram().log()[blocks[:, 1:]]  # (B, T-1)

    def bigram_nll(self, blocks: Tensor) -> Tensor:
        """The same by the token before, interpolated with the frequencies.

        Witten and Bell's weights: after a token that was followed by n tokens, t of them different, the pair's own
        frequency counts n / (n + t). No weight has to be chosen. Source: Chen & Goodman 1999, section 2.6.
        """
        before, after = blocks[:, :-1], blocks[:, 1:]
        followed = self.pairs.sum(dim=1)[before]  # (B, T-1)
        different = (self.pairs > 0).sum(dim=1)[before].clamp_min(1)
        probability = (self.pairs[before, after] + different * self._unigram()[after]) / (followed + different)
        return -probability.log()

    def _unigram(self) -> Tensor:
        return (self.single + 1) / (self.single + 1).sum()
