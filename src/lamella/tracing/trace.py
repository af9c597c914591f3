"""Recording of routing decisions: all k choices, real tokens only, once under checkpointing, right with a cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamella.errors import LamellaError
from lamella.routing import Routing
from lamella.routing.context import find_tracker

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("adapter", "stack", "layer", "module", "expert", "num_experts", "share", "mean_weight", "entropy", "tokens")


@dataclass
class _Router:
    """Running sums of one router: selections and weights per expert ``(E,)``, entropy and tokens."""

    counts: Tensor
    weights: Tensor
    entropy: Tensor
    tokens: Tensor

    @classmethod
    def empty(cls, num_experts: int, device: torch.device) -> "_Router":
        sums = torch.zeros(num_experts, dtype=torch.float64, device=device)
        return cls(sums.long(), sums, sums.sum(), sums.sum().long())

    def add(self, routing: Routing, mask: Tensor | None) -> None:
        indices, weights, probs = routing.indices, routing.weights.detach(), routing.probs.detach()
        if mask is not None:
            indices, weights, probs = indices[mask], weights[mask], probs[mask]
        self.counts += torch.bincount(indices.flatten(), minlength=len(self.counts))
        self.weights = self.weights.index_add(0, indices.flatten(), weights.flatten().double())
        self.entropy = self.entropy + torch.special.entr(probs).sum().double()
        self.tokens = self.tokens + len(indices)


class Trace:
    """What the routers did while it was recorded, per adapter, stack, layer and module."""

    def __init__(self) -> None:
        self._routers: dict[tuple[str, str, int, str], _Router] = {}

    def observe(self, layer: Any, adapter: str, routing: Routing, mask: Tensor | None) -> None:
        """Takes in one router's decision; called by the layers."""
        key = (adapter, layer.place.stack, layer.place.layer, layer.place.module)
        if key not in self._routers:
            self._routers[key] = _Router.empty(routing.num_experts, routing.logits.device)
        with torch.no_grad():
            self._routers[key].add(routing, mask)

    @property
    def counts(self) -> dict[tuple[str, str, int, str], Tensor]:
        """Selections per expert, ``(E,)``, by (adapter, stack, layer, module)."""
        return {key: router.counts.cpu() for key, router in self._routers.items()}

    @property
    def entropy(self) -> dict[tuple[str, str, int, str], float]:
        """Mean entropy of a token's probabilities over all experts, in nats; at most ln E."""
        return {key: float(router.entropy / router.tokens.clamp_min(1)) for key, router in self._routers.items()}

    @property
    def frame(self) -> "pd.DataFrame":
        """A row per router and expert.

        ``share`` is the fraction of the router's selections that fell on the expert (sums to 1 over experts),
        ``mean_weight`` the mean over all real tokens of the weight the expert got (zero where not chosen; sums to 1),
        ``entropy`` the router's mean entropy in nats, ``tokens`` the real tokens it saw.
        """
        import pandas as pd

        rows = []
        for (adapter, stack, layer, module), router in self._routers.items():
            tokens = int(router.tokens)
            share = (router.counts / router.counts.sum().clamp_min(1)).tolist()
            mean_weight = (router.weights / max(tokens, 1)).tolist()
            entropy = float(router.entropy) / max(tokens, 1)
            for expert, (part, weight) in enumerate(zip(share, mean_weight, strict=True)):
                rows.append((adapter, stack, layer, module, expert, len(share), part, weight, entropy, tokens))
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def save(self, path: str | Path) -> None:
        """Writes ``frame`` as Parquet, whole or not at all."""
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.unfinished")
        self.frame.to_parquet(unfinished, index=False)
        unfinished.replace(path)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Trace]:
    """Records what the routers of a model do inside the context; outside it, recording costs nothing.

    Args:
        model: a model with a lamella adapter.

    Raises:
        LamellaError: the model has no lamella adapter.
    """
    tracker = find_tracker(model)
    if tracker is None:
        raise LamellaError(
            f"{type(model).__name__} has no lamella adapter, so there is no routing to record; apply one with "
            "get_peft_model(model, MolaConfig(...)) first."
        )
    trace = Trace()
    tracker.observers.append(trace.observe)
    try:
        yield trace
    finally:
        tracker.observers.remove(trace.observe)
