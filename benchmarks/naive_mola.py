"""The form that MoLA's first implementations have: one pair of linear maps per expert and a loop over them.

Written anew as the yardstick for lamella's forms: every expert picks out its tokens, maps them down and up, weighs what
comes out and adds it to a copy of the output, and autograd keeps all of it for the backward pass.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BertModel

from benchmarks.encoder import clone
from lamella.routing import Router
from lamella.tuners.mola.layer import MolaLinear


class NaiveMola(nn.Module):
    """``y = W0 x + s * sum_{e in top-k} g_e B_e A_e x`` by a loop over the experts, without a balance loss.

    Args:
        base: the frozen linear layer.
        num_experts: E.
        r: rank of each expert.
        top_k: experts per token.
        scaling: what the experts' sum is multiplied by.
    """

    def __init__(self, base: nn.Linear, num_experts: int, r: int, top_k: int, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.top_k = top_k
        self.scaling = scaling
        self.router = nn.Linear(base.in_features, num_experts, bias=False)
        self.down = nn.ModuleList(nn.Linear(base.in_features, r, bias=False) for _ in range(num_experts))
        self.up = nn.ModuleList(nn.Linear(r, base.out_features, bias=False) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x (..., in)`` to ``(..., out)``."""
        y = self.base(x)
        tokens = x.reshape(-1, x.shape[-1])  # (N, in)
        logits = self.router(tokens)  # (N, E)
        # float32 or wider, as in lamella, so that in float64 both decide alike
        probs = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        weights, indices = probs.topk(self.top_k, dim=-1)  # (N, k), (N, k)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        chosen = nn.functional.one_hot(indices, len(self.down)).permute(2, 0, 1)  # (E, N, k)
        mixed = tokens.new_zeros(len(tokens), y.shape[-1])  # (N, out)
        for expert, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            token, slot = torch.where(chosen[expert])
            out = up(down(tokens[token])) * weights[token, slot, None]  # (n, out)
            mixed.index_add_(0, token, out)
        return y + self.scaling * mixed.view_as(y)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients laid out as lamella's tensors: A ``(E, r, in)``, B ``(E, out, r)``, router ``(E, in)``."""
        return {
            "A": torch.stack([_gradient(down) for down in self.down]),
            "B": torch.stack([_gradient(up) for up in self.up]),
            "router": _gradient(self.router),
        }


def naive_copy(base: BertModel, model: PeftModel) -> BertModel:
    """A clone of ``base`` with naive layers in place of the MoLA layers of ``model``, with the same weights.

    Args:
        base: the backbone that ``model`` was made from, without adapters.
        model: a PeftModel with an active MoLA adapter.
    """
    adapter = model.active_adapters[0]
    naive = clone(base)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, MolaLinear):
            parent, _, child = name.rpartition(".")
            setattr(naive.get_submodule(parent), child, _copy_layer(layer, adapter, naive.get_submodule(name)))
    return naive


@torch.no_grad()
def _copy_layer(layer: MolaLinear, adapter: str, base: nn.Module) -> NaiveMola:
    assert isinstance(base, nn.Linear)  # the measured models have no other
    experts = layer.experts[adapter]
    naive = NaiveMola(base, experts.num_experts, experts.r, experts.top_k, experts.scaling).to(base.weight)
    down, up = layer.factors(adapter)
    for expert in range(experts.num_experts):
        _weight(naive.down[expert]).copy_(down[expert])
        _weight(naive.up[expert]).copy_(up[expert])
    router = layer.lamella_mola_router[adapter]
    assert isinstance(router, Router)
    naive.router.weight.copy_(router.weight)
    return naive


def _weight(linear: nn.Module) -> Tensor:
    assert isinstance(linear, nn.Linear)
    return linear.weight


def _gradient(linear: nn.Module) -> Tensor:
    gradient = _weight(linear).grad
    assert gradient is not None  # also an expert without tokens has one, of zeros
    return gradient
