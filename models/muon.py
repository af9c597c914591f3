"""Muon for the matrices of a model's layers, those of fused experts among them, and AdamW for the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_ROUTER = re.compile(r"\.(gate\.weight|router\.classifier\.weight)$")
_HALVES = "gate_up_proj"  # of a fused module: two matrices, one above the other


class Muon(torch.optim.Optimizer):
    """One optimizer of two: `torch.optim.Muon` for matrices, AdamW for embeddings, routers and vectors.

    A small language model learns from a third of the tokens that AdamW alone needs. Muon makes each update orthogonal,
    which means something for a single matrix alone: a fused parameter ``(E, out, in)`` is updated as E matrices, and a
    gate and an up-projection that lie in one parameter as two.

    Args:
        model: its trainable parameters are updated.
        lr: of both; Muon's updates are scaled to the size of AdamW's.
        weight_decay: of Muon's matrices.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        self._views: list[tuple[nn.Parameter, str, list[nn.Parameter]]] = []
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.ndim < 2 or min(parameter.shape) == 1 or id(parameter) in embeddings or _ROUTER.search(name):
                others.append(parameter)
            elif parameter.ndim == 2:
                matrices.append(parameter)
            else:
                views = [nn.Parameter(view) for view in _matrices(name, parameter.data)]
                self._views.append((parameter, name, views))
                matrices += views
        self._muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        super().__init__([*matrices, *others], {"lr": lr})
        # the two's own groups, so that a schedule that sets a rate here sets it there
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for parameter, name, views in self._views:
            if parameter.grad is not None:
                for view, gradient in zip(views, _matrices(name, parameter.grad), strict=True):
                    view.grad = gradient
        self._muon.step()
        self._adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those of fused parameters too."""
        super().zero_grad(set_to_none)
        for parameter, _, _ in self._views:
            parameter.grad = None


def _matrices(name: str, fused: Tensor) -> Iterator[Tensor]:
    """The matrices that lie in a fused parameter ``(E, out, in)``, as views of it."""
    for expert in fused:
        yield from expert.chunk(2) if name.endswith(_HALVES) else (expert,)
