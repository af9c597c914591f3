"""Few experts for each batch: those that it can do without at least damage are closed, while the model serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lamella.backbones.modes import evaluating
from lamella.backbones.moe import MoELayer, SequencesApart, real_tokens
from lamella.backbones.moe.family import bare
from lamella.backbones.offloading import onloaded
from lamella.compiling import eagerly
from lamella.errors import LamellaError, optional_module
from lamella.progress import counted
from lamella.similarity.compression.calibration import LayerSample
from lamella.similarity.compression.criteria.replacing import replacement_damage
from lamella.similarity.compression.routes import choose_measure, directed, native_layers
from lamella.similarity.pairs import NAMES, Name

if TYPE_CHECKING:
    import pandas as pd

    from lamella.similarity.activations import Capture

BATCHED = SequencesApart("what stands at one place in it is no batch, whose experts could be limited")
_IMPLEMENTATION = "lamella_limited"  # as the configs of models name it


def damages(capture: Capture, model: nn.Module) -> pd.DataFrame:
    """What it costs to give a token of one expert to another of its layer instead, for every ordered pair of a layer.

    ``damage`` is ``sum_x g(x)^2 |f(x) - f'(x)|^2 / sum_x g(x)^2`` over the tokens x of the source, f its function, g
    its weight and f' the target's function: times a token's squared weight it is the squared error of the layer's
    output. An expert that was never chosen is judged on all of its layer's tokens.

    Args:
        capture: of this model; it says which tokens each expert is given.
        model: that came with its experts.

    Returns:
        A row per pair, which ``reroute`` and ``find_routes(..., measure="damage")`` read: source_layer, source_expert,
        target_layer, target_expert, damage.

    Raises:
        LamellaError: a capture of another model.
    """
    pd = optional_module("pandas", "A table of damages")
    capture.check(model)
    parts = []
    with evaluating(model):
        for layer in counted(native_layers(model).values(), "measuring damages", "layers"):
            with onloaded(*layer.experts_module.modules()):
                table = _damage(LayerSample.of(layer, capture))  # (E, E)
            sources, targets = torch.where(~torch.eye(len(table), dtype=torch.bool, device=table.device))
            columns = (layer.index, sources.cpu().numpy(), layer.index, targets.cpu().numpy())
            part = dict(zip(NAMES, columns, strict=True)) | {"damage": table[sources, targets].cpu().numpy()}
            parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def _damage(sample: LayerSample) -> Tensor:
    """Of each expert by each other, ``(E, E)``."""
    squares = sample.mean(sample.gates.square())  # (E,)
    products = sample.mean(sample.products)  # (E, E)
    own = products.diagonal()
    apart = (own[:, None] + own - 2 * products).clamp_min(0)
    return torch.where(squares[:, None] > 0, replacement_damage(sample) / squares[:, None].clamp_min(1e-300), apart)


@dataclass(frozen=True, eq=False)
class Limit:
    """At most ``limit`` experts of a layer for the tokens of one place of the sequences of a batch.

    An expert costs a batch the sum, over its tokens there, of their squared weight times the damage by the best other
    expert. Those that cost least are closed.

    Attributes:
        limit: how many stay open.
        damage: of each layer, ``(E, E)``, source by target; infinite where it may not go.
        closable: of each layer, ``(E,)``.
    """

    limit: int
    damage: Mapping[int, Tensor]
    closable: Mapping[int, Tensor]

    @classmethod
    def of(cls, layers: Mapping[int, MoELayer], experts: Sequence[Name], limit: int, table: pd.DataFrame) -> Limit:
        """The limit of some experts' layers, by the damages of a table.

        Raises:
            LamellaError: a limit below what a token gets or what may not be closed, or a table without a pair.
        """
        measure = choose_measure(table, "damage", aligned=False)
        damage, closable = {}, {}
        for index in sorted({index for index, _ in experts}):
            layer, keys = layers[index], [(index, expert) for expert in range(layers[index].num_experts)]
            mine = [expert for of, expert in experts if of == index]
            fewest = max(layer.top_k, layer.num_experts - len(mine))
            if limit < fewest:
                raise LamellaError(
                    f"limit={limit}: a token of layer {index} gets {layer.top_k} experts, and "
                    f"{layer.num_experts - len(mine)} of its {layer.num_experts} may not be closed; give {fewest} or "
                    "more."
                )
            of_layer = table[(table["source_layer"] == index) & (table["target_layer"] == index)]
            distances = torch.from_numpy(directed(of_layer, keys, measure)).float()
            apart = distances.masked_fill(torch.eye(len(keys), dtype=torch.bool), 0)
            if (missing := apart[mine].isinf().nonzero().tolist())[:1]:
                raise LamellaError(
                    f"The table has no damage of expert {mine[missing[0][0]]} of layer {index} by expert "
                    f"{missing[0][1]}; make it with lamella.similarity.damages, or leave the expert out."
                )
            damage[index] = distances
            closable[index] = torch.zeros(len(keys), dtype=torch.bool).index_fill_(0, torch.tensor(mine), True)
        return cls(limit, damage, closable)

    def closed(self, layer: int, indices: Tensor, weights: Tensor, real: Tensor, shape: tuple[int, int]) -> Tensor:
        """Which experts are closed at each place, ``(tokens, E)``.

        Args:
            layer: whose.
            indices, weights: what the router decided, ``(N, k)``, N = batch x tokens.
            real: which tokens count, ``(N,)``.
            shape: batch and tokens.
        """
        damage, closable = self.damage[layer].to(weights.device), self.closable[layer].to(weights.device)
        experts = len(damage)
        squares = weights.detach().float().square() * real[:, None]  # (N, k)
        needs = squares.new_zeros(len(squares), experts).scatter_add_(1, indices, squares)  # (N, E)
        needs = needs.view(*shape, experts).sum(dim=0)  # (tokens, E)
        costs = torch.where(needs > 0, needs * damage.amin(dim=1), 0).masked_fill(~closable, torch.inf)
        opened = costs.argsort(dim=1, descending=True, stable=True)[:, : self.limit]
        return torch.ones_like(costs, dtype=torch.bool).scatter_(1, opened, False)

    def rerouted(self, layer: int, indices: Tensor, weights: Tensor, real: Tensor, shape: tuple[int, int]) -> Tensor:
        """Indices ``(N, k)`` where each expert that is closed is the open one that does it the least damage."""
        closed = self.closed(layer, indices, weights, real, shape)  # (tokens, E)
        nearest = self.damage[layer].to(indices.device).argsort(dim=1, stable=True)  # (E, E), each one's others
        first = (~closed)[:, nearest].byte().argmax(dim=-1)  # (tokens, E): the first that is open
        targets = nearest.expand(len(first), -1, -1).gather(2, first[..., None])[..., 0]  # (tokens, E)
        own = torch.arange(closed.shape[1], device=indices.device)
        targets = torch.where(closed, targets, own).repeat(shape[0], 1)  # (N, E)
        return targets.gather(1, indices)


@dataclass(frozen=True, eq=False)
class _Serving:
    """What the experts of one layer do while a limit holds: ``original``, with other indices where it is limited."""

    layer: MoELayer
    limit: Limit
    original: Callable[..., Tensor]


_SERVING: WeakKeyDictionary[nn.Module, _Serving] = WeakKeyDictionary()


def _limited_experts(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A function for experts, as transformers' interface takes them."""
    serving = _SERVING.get(experts)
    if serving is None:
        raise LamellaError(
            f"experts_implementation={_IMPLEMENTATION!r} is set by lamella.similarity.reroute for as long as it holds; "
            "load the model with another."
        )
    layer = serving.layer
    if layer.index in serving.limit.damage:
        known = real_tokens(layer, hidden_states)
        if known is None:
            raise LamellaError(
                f"The experts of layer {layer.index} run outside a forward of their model, where nothing says which "
                "tokens are a batch whose experts could be limited. Call the model itself."
            )
        BATCHED.check(layer, hidden_states)
        top_k_index = serving.limit.rerouted(layer.index, top_k_index, top_k_weights, *known)
    return serving.original(experts, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _limited_experts)


@contextmanager
def serving(model: nn.Module, layers: Sequence[MoELayer], limit: Limit) -> Iterator[None]:
    """Inside the context, tokens whose expert is closed go to the open one that does it the least damage.

    It is a function for experts of transformers' interface that changes indices and calls the one that was set before.

    Args:
        model: of the layers.
        layers: all that it has.
        limit: of some of them.

    Raises:
        LamellaError: experts that transformers does not run by its interface, or a limit inside another.
    """
    served: dict[Any, _Serving] = {}
    for layer in layers:
        experts = bare(layer.experts_module)
        if hasattr(experts, "_is_expert_parallel") and hasattr(type(experts).forward, "__wrapped__"):
            own, before = type(experts).forward.__wrapped__, experts.config._experts_implementation
            served[experts] = _Serving(layer, limit, ALL_EXPERTS_FUNCTIONS.get_interface(before, own))
        elif layer.index in limit.damage:
            raise LamellaError(
                f"The experts of layer {layer.index} ({type(experts).__name__}) are not run by transformers' interface "
                "for experts, so their tokens are not rerouted while they are served; next_choice and drop take a "
                "limit there too."
            )
    if any(experts in _SERVING for experts in served):
        raise LamellaError("The experts of a batch are limited already; leave that reroute before another.")
    configs = {id(experts.config): (experts.config, experts.config._experts_implementation) for experts in served}
    _SERVING.update(served)
    try:
        for config, _ in configs.values():
            config._experts_implementation = _IMPLEMENTATION
        with BATCHED.of(model), eagerly():
            yield
    finally:
        for config, before in configs.values():
            config._experts_implementation = before
        for experts in served:
            del _SERVING[experts]
