"""A router's own forward: with some experts closed to it, or with an eye on how it scores them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, softplus
from torch.overrides import TorchFunctionMode

_MAPS = (linear, torch.mm, Tensor.mm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_SELECTIONS = (torch.topk, Tensor.topk)
_MAXIMA = (torch.max, Tensor.max, torch.argmax, Tensor.argmax)


class Without(TorchFunctionMode):
    """Inside the context, a router decides as if its logits of the closed experts were minus infinity.

    It is the router's own code that decides, whatever it makes of its logits. What is closed counts as minus infinity
    in each choice of the largest too: a sigmoid of minus infinity is 0, to which a bias may be added. Where the best
    groups of experts have fewer open ones than are chosen, others come after them.

    Args:
        closed: which experts may not be chosen, ``(E,)``, or of each token, ``(N, E)``.
        columns: how many logits the router computes; the first E of them are the experts'.
    """

    def __init__(self, closed: Tensor, columns: int) -> None:
        super().__init__()
        more = columns - closed.shape[-1]
        self._closed = pad(closed, (0, more)) if more else closed
        self._widths = {closed.shape[-1], columns}
        self._by_groups: Tensor | None = None  # what the best of each group were taken of, (N, E)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MAPS:
            output = func(*args, **kwargs)
            return self._close(output) if output.shape[-1] in self._widths else output
        if func in _SELECTIONS or func in _MAXIMA:
            given: Tensor = args[0]
            if given.shape[-1] in self._widths:
                if func in _SELECTIONS and self._by_groups is not None:
                    return self._choose(given, kwargs["k"] if "k" in kwargs else args[1])
                args = (self._close(given), *args[1:])
            elif given.dim() > 2 and given.shape[-2] * given.shape[-1] in self._widths:  # (N, groups, E / groups)
                self._by_groups = self._close(given.flatten(-2))
                args = (self._by_groups.view(given.shape), *args[1:])
        return func(*args, **kwargs)

    def _close(self, scores: Tensor) -> Tensor:
        closed = self._closed[..., : scores.shape[-1]]
        if not scores.is_floating_point():
            return scores
        return scores.masked_fill(closed if closed.dim() == 1 else closed.view(scores.shape), -torch.inf)

    def _choose(self, allowed: Tensor, top_k: int) -> Any:
        """The k best ``(N, k)`` of the groups that are left in ``allowed (N, E)``, then the best of the others."""
        assert self._by_groups is not None
        scores = self._by_groups
        ranks = scores.argsort(dim=-1).argsort(dim=-1) + scores.shape[-1] * (allowed == scores)
        indices = ranks.masked_fill(scores.isneginf(), -1).topk(top_k, dim=-1).indices
        return torch.return_types.topk((scores.gather(-1, indices), indices))


_SCORES = (torch.sigmoid, Tensor.sigmoid, softplus, torch.sqrt, Tensor.sqrt)


class Scored(TorchFunctionMode):
    """Inside the context, remembers what a router makes of the logits of its experts where that is no softmax.

    Attributes:
        scores: what the last function that maps each logit by itself put out, ``(N, columns)``; None before.
    """

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.scores: Tensor | None = None
        self._columns = columns

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        if func in _SCORES and output.dim() > 1 and output.shape[-1] == self._columns:
            self.scores = output.flatten(0, -2)
        return output
