"""What criteria read of a layer: a sample of its tokens, and what its router and every expert make of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamella.backbones.modes import evaluating
from lamella.backbones.moe import MoELayer, NativeRouting
from lamella.errors import LamellaError
from lamella.similarity.swapping.scores import Batch, batch_scores, inputs_on

if TYPE_CHECKING:
    from lamella.similarity.activations import Capture

ROWS = 8192  # tokens of a layer at most, so that (rows, experts, experts) fits
_CHUNK = 256  # tokens whose outputs by all experts are held at once


@dataclass(frozen=True, eq=False)
class LayerSample:
    """Tokens of one layer, and what its router and its E experts do with them.

    Attributes:
        layer: the layer, in evaluation mode.
        x: the tokens, ``(N, h)``.
        share: what share of the text's tokens each stands for, ``(N,)``, summing to 1.
    """

    layer: MoELayer
    x: Tensor
    share: Tensor

    @classmethod
    def of(cls, layer: MoELayer, capture: Capture) -> LayerSample:
        """The tokens that a capture holds of the layer.

        A capture samples each expert's own tokens. Each sample stands for as many tokens as its expert was given per
        sample; a token that k experts were given is counted through all of them, so each counts for 1/k of it
        (Horvitz and Thompson 1952). So sums are unbiased, and a rare expert has as many tokens as others.

        Raises:
            LamellaError: the capture holds no token of the layer.
        """
        counts, experts = capture.counts[layer.index], range(layer.num_experts)
        each = max(1, ROWS // layer.num_experts)
        held = [capture.inputs(layer.index, expert)[:each] for expert in experts]
        if not any(len(rows) for rows in held):
            raise LamellaError(f"The capture holds no token of layer {layer.index}; capture text that reaches it.")
        given = (counts["selected"] - counts["dropped"]).tolist()
        stands_for = [
            torch.full((len(rows),), given[e] / max(1, len(rows))) for e, rows in zip(experts, held, strict=True)
        ]
        weight = layer.experts[0].down
        x, share = torch.cat(held).to(weight), torch.cat(stands_for).double().to(weight.device)
        return cls(layer, x, share / share.sum())

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.layer.num_experts

    @property
    def group_of(self) -> list[int]:
        """The group of each expert, where the router chooses groups first; otherwise all are of one, ``(E,)``."""
        size = self.num_experts // router_groups(self.layer)
        return [expert // size for expert in range(self.num_experts)]

    @cached_property
    def routing(self) -> NativeRouting:
        """What the router decides."""
        with torch.no_grad():
            return self._route(self.x)

    @cached_property
    def gates(self) -> Tensor:
        """What each expert's output is multiplied by, 0 where it was not chosen, ``(N, E)``."""
        return self._dense(self.routing)

    @cached_property
    def chosen(self) -> Tensor:
        """Who was chosen, ``(N, E)``."""
        return torch.zeros_like(self.gates, dtype=torch.bool).scatter_(1, self.routing.indices, True)

    def gates_without(self, gone: Collection[int], rows: Tensor) -> Tensor:
        """The gates of some of the tokens, ``(n, E)``, when the router cannot choose the experts that are gone."""
        with torch.no_grad(), self.layer.mask(gone):
            return self._dense(self._route(self.x[rows]))

    @cached_property
    def is_local(self) -> bool:
        """Whether the router decides as before for tokens that had not chosen an expert when that one goes.

        Not where gates are shares of a softmax over all experts.
        """
        gone = int(self.frequency.argmin())
        others = torch.where(~self.chosen[:, gone])[0][:_CHUNK]
        return torch.allclose(self.gates_without([gone], others), self.gates[others])

    @cached_property
    def frequency(self) -> Tensor:
        """The share of tokens that each expert is given, ``(E,)``."""
        return self.share @ self.chosen.to(self.share)

    @cached_property
    def products(self) -> Tensor:
        """The inner products of what two experts make of the same token, ``(N, E, E)``."""
        return torch.cat([outputs @ outputs.transpose(1, 2) for outputs in self._outputs()])  # (n, E, h) each

    @cached_property
    def norms(self) -> Tensor:
        """The norm of what each expert makes of each token, chosen or not, ``(N, E)``."""
        return self.products.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()

    def mean_outputs(self, weights: Tensor) -> Tensor:
        """``sum_t weights[t, e] f_e(x_t) / sum_t weights[t, e]``, ``(E, h)``; 0 where all weights are."""
        total = torch.zeros(self.num_experts, self.x.shape[1], dtype=torch.float64, device=self.x.device)
        for outputs, of_chunk in zip(self._outputs(), weights.split(_CHUNK), strict=True):
            total += torch.einsum("neh,ne->eh", outputs.double(), of_chunk.double())
        return total / weights.double().sum(0).clamp_min(1e-30)[:, None]

    def errors(self, changed: Tensor, rows: Tensor) -> Tensor:
        """``|sum_e changed[n, e] f_e(x_n)|^2`` for some of the tokens, ``(n,)``; ``changed (n, E)``."""
        return torch.einsum("ne,nef,nf->n", changed, self.products[rows].to(changed), changed).clamp_min(0)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the tokens of the text of ``values (N, ...)``."""
        return torch.tensordot(self.share, values.double(), dims=1)

    def _outputs(self) -> Iterator[Tensor]:
        """What all experts make of the tokens, chunk by chunk, ``(n, E, h)`` each."""
        experts = [self.layer.experts[expert] for expert in range(self.num_experts)]
        wide = torch.promote_types(self.x.dtype, torch.float32)
        with torch.no_grad():
            for x in self.x.split(_CHUNK):
                yield torch.stack([expert(x).to(wide) for expert in experts], dim=1)

    def _route(self, x: Tensor) -> NativeRouting:
        """Each token as a sequence of its own, so that none takes another's room where experts have a capacity."""
        return self.layer.router(x[:, None])

    def _dense(self, routing: NativeRouting) -> Tensor:
        weights = routing.weights.double()
        return weights.new_zeros(len(weights), self.num_experts).scatter_add_(1, routing.indices, weights)


def router_groups(layer: MoELayer) -> int:
    """In how many groups the experts are of which the router chooses some first; 1 where there are none."""
    for module in (layer.router_module, layer.module):
        for name in ("num_group", "n_group"):
            if isinstance(groups := getattr(module, name, None), int):
                return groups
    return 1


def fewest_experts(layer: MoELayer) -> int:
    """The fewest experts that the router can choose from: as many as a token gets, and that from the chosen groups.

    A router that chooses groups scores them by their two best experts, as DeepSeek-V3's does.
    """
    groups = router_groups(layer)
    if groups == 1:
        return layer.top_k
    router: Any = layer.router_module if hasattr(layer.router_module, "topk_group") else layer.module
    return groups * max(2, -(-layer.top_k // router.topk_group))


def layer_gradients(model: nn.Module, layers: Sequence[MoELayer], batches: Iterable[Batch]) -> dict[int, float]:
    """How strongly the loss depends on what each layer's experts put out together, by layer index.

    The mean over tokens of the squared norm of the gradient of a token's summed loss: to first order, an error of the
    layer with independent entries changes the loss by as much as its squared norm times this, over ``h``. One forward
    and one backward pass of the texts; parameters get no gradients.

    Args:
        model: of the layers.
        layers: whose experts' outputs to look at.
        batches: what the model is called with.

    Raises:
        LamellaError: there is no text, or the gradient is not finite.
    """
    squares, tokens = dict.fromkeys((layer.index for layer in layers), 0.0), 0.0
    device = next(model.parameters()).device
    with evaluating(model), _without_parameters(model):
        for batch in batches:
            with _probes(layers) as probes, torch.enable_grad():
                sums, weights = batch_scores(model, inputs_on(device, batch))
            gradients = torch.autograd.grad(sums.sum(), list(probes.values()))
            tokens += float(weights.sum())
            for index, gradient in zip(probes, gradients, strict=True):
                squares[index] += float(gradient.double().square().sum())
    if not tokens:
        raise LamellaError("There is no text to take the gradient of; give at least one batch with a token to predict.")
    if bad := next((index for index, square in squares.items() if not square < float("inf")), None):
        raise LamellaError(f"The gradient of layer {bad} is not finite; load the model in bfloat16 or float32.")
    return {index: square / tokens for index, square in squares.items()}


@contextmanager
def _probes(layers: Sequence[MoELayer]) -> Iterator[Mapping[int, Tensor]]:
    """Inside the context, zeros are added to what each layer's experts put out; the loss's gradient reaches them."""
    probes: dict[int, Tensor] = {}

    def watch(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            probes[index] = torch.zeros_like(output, requires_grad=True)
            return output + probes[index]

        return hook

    handles = [layer.experts_module.register_forward_hook(watch(layer.index)) for layer in layers]
    try:
        yield probes
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_parameters(model: nn.Module) -> Iterator[None]:
    """Inside the context no parameter needs a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
