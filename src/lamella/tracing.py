"""Recording of routing decisions: all k choices, real tokens only, once under checkpointing, right with a cache.

Routers of lamella's adapters are recorded, and those that a mixture-of-experts model came with.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lamella.backbones.moe import FAMILIES, Dispatch, explain_unknown, find_moe_layers, watch_dispatch
from lamella.errors import LamellaError, optional_module
from lamella.files import atomic
from lamella.routing import RoutedCall, Routing, current_frame, find_tracker
from lamella.tuners.routed import routed_layers

if TYPE_CHECKING:
    import pandas as pd

NATIVE = "native"  # the adapter's name of routers that belong to no adapter
FIRST_COLUMNS = (  # those that every edition's traces have
    "adapter", "stack", "layer", "module", "expert", "num_experts", "share", "mean_weight", "entropy", "tokens",
    "dropped",
)  # fmt: skip
COLUMNS = (*FIRST_COLUMNS, "effective_experts", "name")
TOKEN_COLUMNS = (
    "adapter", "stack", "layer", "module", "call", "sequence", "position", "rank", "expert", "weight",
)  # fmt: skip
PAIR_COLUMNS = ("adapter", "stack", "layer", "module", "expert", "other", "share")
Key = tuple[str, str, int, str]  # adapter, stack, layer, module


@dataclass(frozen=True)
class RouterUse:
    """How one router used its experts.

    Attributes:
        adapter: of the router; "native" where it belongs to none.
        stack: the stack of blocks it lies in.
        layer: the block's index in that stack.
        module: its name inside the block.
        shares: per expert, the part of the router's selections that fell on it; they sum to 1.
        mean_weights: per expert, the mean weight over all decisions, zero where it was not chosen.
        entropy: mean entropy of the probabilities over all experts, in nats; at most ln E.
        tokens: the decisions taken: one per real token, sequence or batch, whichever a decision is for.
        dropped: per expert, the selections that it had no room for, which count nowhere else.
        effective_experts: by how many experts a decision counts, ``(sum |w|)^2 / sum w^2`` over its weights, in the
            mean: 1 where one has all the weight, k where k weigh alike. NaN in traces that lack it.
        names: of the experts, such as those of composed LoRAs; empty where they have only numbers.
    """

    adapter: str
    stack: str
    layer: int
    module: str
    shares: tuple[float, ...]
    mean_weights: tuple[float, ...]
    entropy: float
    tokens: int
    dropped: tuple[int, ...]
    effective_experts: float
    names: tuple[str, ...] = ()

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return len(self.shares)


@dataclass
class _Router:
    """Running sums of one router: selections and weights per expert ``(E,)``, tokens that chose both of a pair of
    experts ``(E, E)``, entropy, tokens and effective experts; and apart from them, per expert, selections it had no
    room for ``(E,)``.
    """

    counts: Tensor
    dropped: Tensor
    weights: Tensor
    together: Tensor
    entropy: Tensor
    tokens: Tensor
    effective: Tensor

    @classmethod
    def empty(cls, num_experts: int, device: torch.device) -> "_Router":
        sums = torch.zeros(num_experts, dtype=torch.float64, device=device)
        pairs = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=device)
        return cls(sums.long(), sums.long(), sums, pairs, sums.sum(), sums.sum().long(), sums.sum())

    def add(self, routing: Routing, mask: Tensor | None) -> None:
        indices, weights, probs = routing.indices, routing.weights.detach(), routing.probs.detach()
        kept, dropped = _kept(routing), _dropped(routing)
        if mask is not None:
            indices, weights, probs = indices[mask], weights[mask], probs[mask]
            kept, dropped = kept[mask], dropped[mask]
        self.counts = self.counts + torch.bincount(indices[kept], minlength=len(self.counts))
        self.dropped = self.dropped + torch.bincount(indices[dropped], minlength=len(self.counts))
        self.weights = self.weights.index_add(0, indices[kept], weights[kept].double())
        chosen = torch.zeros_like(probs).scatter_(1, indices, kept.to(probs.dtype))  # (N, E)
        self.together = self.together + (chosen.T @ chosen).double()
        self.entropy = self.entropy + torch.special.entr(probs).sum().double()
        self.tokens = self.tokens + len(indices)
        used = (weights * kept).double().abs()  # (N, k)
        squares = used.square().sum(dim=-1).clamp_min(torch.finfo(used.dtype).tiny)  # (N,)
        self.effective = self.effective + (used.sum(dim=-1).square() / squares).sum()

    def use(self, key: Key, names: tuple[str, ...]) -> RouterUse:
        """The sums as shares and means."""
        tokens = int(self.tokens)
        return RouterUse(
            *key,
            shares=tuple((self.counts / self.counts.sum().clamp_min(1)).tolist()),
            mean_weights=tuple((self.weights / max(tokens, 1)).tolist()),
            entropy=float(self.entropy) / max(tokens, 1),
            tokens=tokens,
            dropped=tuple(self.dropped.tolist()),
            effective_experts=float(self.effective) / max(tokens, 1),
            names=names,
        )

    def sums(self) -> tuple[Tensor, ...]:
        """The sums on the CPU, in the order of the fields."""
        return tuple(getattr(self, one.name).cpu() for one in fields(self))


class Trace:
    """What the routers did while it was recorded, per adapter, stack, layer and module.

    Args:
        per_token: whether every token's choices are kept.
        names: of a router's experts, where they have any.
    """

    def __init__(self, per_token: bool = False, names: Mapping[Key, tuple[str, ...]] | None = None) -> None:
        self._routers: dict[Key, _Router] = {}
        self._names = names or {}
        self._per_token = per_token
        self._choices: list[tuple[Key, int, Tensor, Tensor, Tensor, Tensor]] = []
        self._calls: list[RoutedCall] = []

    def observe(self, layer: Any, adapter: str, routing: Routing, mask: Tensor | None, shape: torch.Size) -> None:
        """Takes in one router's decision for tokens of that shape, ``(batch, tokens)``, or for sequences ``(batch,)``.

        Called by the layers; ``layer.place`` says where they are.
        """
        key = (adapter, layer.place.stack, layer.place.layer, layer.place.module)
        if key not in self._routers:
            self._routers[key] = _Router.empty(routing.num_experts, routing.logits.device)
        with torch.no_grad():
            self._routers[key].add(routing, mask)
        if self._per_token:
            self._keep(key, routing, mask, shape)

    def observe_native(self, dispatch: Dispatch) -> None:
        """Takes in one decision of a router that the model came with."""
        self.observe(dispatch.layer, NATIVE, dispatch.routing, dispatch.real, torch.Size(dispatch.shape))

    def _keep(self, key: Key, routing: Routing, mask: Tensor | None, shape: torch.Size) -> None:
        frame = current_frame()
        assert frame is not None  # observers are told inside a forward
        if frame.call not in self._calls:
            self._calls.append(frame.call)
        at = _places(shape, routing.granularity)  # (N, 2)
        real = torch.ones(len(at), dtype=torch.bool) if mask is None else mask.cpu()
        kept = _kept(routing).cpu()[real]  # (N, k)
        rows, ranks = torch.where(kept)
        indices, weights = routing.indices.cpu()[real][kept], routing.weights.detach().float().cpu()[real][kept]
        self._choices.append((key, self._calls.index(frame.call), at[real][rows], ranks, indices, weights))

    @property
    def counts(self) -> dict[Key, Tensor]:
        """Selections per expert, ``(E,)``, by (adapter, stack, layer, module); none that it had no room for."""
        return {key: router.counts.cpu() for key, router in self._routers.items()}

    @property
    def dropped(self) -> dict[Key, Tensor]:
        """Selections that the expert had no room for, per expert, ``(E,)``; the token got nothing from it."""
        return {key: router.dropped.cpu() for key, router in self._routers.items()}

    @property
    def entropy(self) -> dict[Key, float]:
        """Mean entropy of a token's probabilities over all experts, in nats; at most ln E."""
        return {key: float(router.entropy / router.tokens.clamp_min(1)) for key, router in self._routers.items()}

    @property
    def routers(self) -> tuple[RouterUse, ...]:
        """What each router did, in the order of their first decisions."""
        return tuple(router.use(key, self._names.get(key, ())) for key, router in self._routers.items())

    @property
    def frame(self) -> "pd.DataFrame":
        """A row per router and expert: `routers` as a table, ``share``, ``mean_weight`` and ``dropped`` by expert.

        ``name`` is the expert's, as of a composed LoRA; empty where it has only its number, ``expert``.

        Raises:
            LamellaError: pandas is not installed.
        """
        rows = [
            (use.adapter, use.stack, use.layer, use.module, expert, use.num_experts, share, weight, use.entropy,
             use.tokens, dropped, use.effective_experts, use.names[expert] if use.names else "")
            for use in self.routers
            for expert, (share, weight, dropped) in enumerate(
                zip(use.shares, use.mean_weights, use.dropped, strict=True)
            )
        ]  # fmt: skip
        return _pandas().DataFrame(rows, columns=list(COLUMNS))

    @property
    def coactivation(self) -> "pd.DataFrame":
        """A row per router and ordered pair of experts: the share of its tokens that chose both.

        Beside itself an expert has the share of tokens that chose it at all.
        """
        rows = []
        for key, router in self._routers.items():
            shares = (router.together / router.tokens.clamp_min(1)).tolist()
            for expert, row in enumerate(shares):
                rows += [(*key, expert, other, share) for other, share in enumerate(row)]
        return _pandas().DataFrame(rows, columns=list(PAIR_COLUMNS))

    def gather(self) -> None:
        """In a process group: adds up what all processes recorded, in every one of them; alone, nothing changes.

        Every process has to call it. ``tokens`` stays what this process saw.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        everyone: list[dict[Key, tuple[Tensor, ...]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, {key: router.sums() for key, router in self._routers.items()})
        added: dict[Key, _Router] = {}
        for one in everyone:
            for key, sums in one.items():
                before = added[key].sums() if key in added else tuple(torch.zeros_like(part) for part in sums)
                added[key] = _Router(*(a + b for a, b in zip(before, sums, strict=True)))
        self._routers = added

    @property
    def tokens(self) -> "pd.DataFrame":
        """A row per token, router and chosen expert: where the token is, the expert's rank among the k, its weight.

        ``call`` counts the forwards recorded, ``sequence`` and ``position`` say where the token lies in that forward's
        input (with a cache, a forward's input is only the new tokens; an image's places are counted row by row). A
        decision for a whole sequence has position -1, one for a whole batch sequence -1 too. A choice that was dropped
        has no row.

        Raises:
            LamellaError: it was not asked for.
        """
        pd = _pandas()
        if not self._per_token:
            raise LamellaError("Tokens were not kept; record with record_routing(model, per_token=True).")
        parts = []
        for (adapter, stack, layer, module), call, at, ranks, indices, weights in self._choices:
            columns = {
                "adapter": adapter,
                "stack": stack,
                "layer": layer,
                "module": module,
                "call": call,
                "sequence": at[:, 0].numpy(),
                "position": at[:, 1].numpy(),
                "rank": ranks.numpy(),
                "expert": indices.numpy(),
                "weight": weights.numpy(),
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(TOKEN_COLUMNS))

    def save(self, path: str | Path) -> None:
        """Writes ``frame`` as Parquet atomically."""
        with atomic(Path(path)) as unfinished:
            self.frame.to_parquet(unfinished, index=False)


def routers_of(frame: "pd.DataFrame") -> list[RouterUse]:
    """What a saved table, as `Trace.frame`, says of each router."""
    keys = ["adapter", "stack", "layer", "module"]
    return [
        RouterUse(
            **dict(zip(keys, key, strict=True)),
            shares=tuple(rows["share"]),
            mean_weights=tuple(rows["mean_weight"]),
            entropy=float(rows["entropy"].iloc[0]),
            tokens=int(rows["tokens"].iloc[0]),
            dropped=tuple(rows["dropped"]),
            effective_experts=float(rows["effective_experts"].iloc[0]) if "effective_experts" in rows else math.nan,
            names=tuple(rows["name"]) if "name" in rows and rows["name"].all() else (),
        )
        for key, rows in frame.groupby(keys, sort=False)
    ]


def _pandas() -> Any:
    return optional_module("pandas", "A trace's table")


def _places(shape: torch.Size, granularity: str) -> Tensor:
    """The sequence and position that each row of a decision is for, ``(N, 2)``; -1 for all of them."""
    if granularity == "batch":
        return torch.full((1, 2), -1)
    if granularity == "sequence":
        return torch.stack([torch.arange(shape[0]), torch.full(shape[:1], -1)], dim=1)
    rows, each = torch.arange(shape.numel()), max(1, shape[len(shape) > 1 :].numel())
    return torch.stack([rows // each, rows % each], dim=1)


def _kept(routing: Routing) -> Tensor:
    """Which choices were carried out, ``(N, k)``."""
    kept: Tensor | None = getattr(routing, "kept", None)
    return torch.ones_like(routing.indices, dtype=torch.bool) if kept is None else kept


def _dropped(routing: Routing) -> Tensor:
    """Which choices an expert had no room for, ``(N, k)``; none where the router chose to skip the experts."""
    skipped: Tensor | None = getattr(routing, "skipped", None)
    return ~_kept(routing) if skipped is None else ~_kept(routing) & ~skipped


@contextmanager
def record_routing(model: nn.Module, per_token: bool = False) -> Iterator[Trace]:
    """Records what the routers of a model do inside the context; outside it, recording costs nothing.

    In a mixture-of-experts model with a lamella adapter both are recorded, distinguished by the column ``adapter``. In
    ``generate`` a row that has ended runs on with the others, as real tokens to the model, and so it does here.

    Args:
        model: a model with a lamella adapter, or a mixture of experts of a family that lamella knows.
        per_token: also keep every token's experts and weights, for ``Trace.tokens``; memory grows with the tokens.

    Raises:
        LamellaError: the model has neither.
    """
    tracker = find_tracker(model)
    native = find_moe_layers(model, [family for family in FAMILIES if family.native])
    if tracker is None and not native:
        raise LamellaError(_nothing_to_record(model))
    named = {
        (one.adapter, one.place.stack, one.place.layer, one.place.module): one.expert_names
        for one in routed_layers(model)
    }
    trace = Trace(per_token, named)
    with ExitStack() as recording:
        if tracker is not None:
            recording.enter_context(tracker.observed(trace.observe))
        if native:
            recording.enter_context(watch_dispatch(model, native, trace.observe_native))
        yield trace


def _nothing_to_record(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} has no lamella adapter, so there is no routing to record; apply one with "
        "get_peft_model(model, MolaConfig(...)) or MolexConfig(...), or compose LoRAs with lamella.compose, first. "
        f"Nor has it experts of its own that lamella could watch: {explain_unknown(model)}"
    )
