"""Routers: from a token's features to the experts it uses and their weights."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lamella.errors import LamellaError

RouterKind = Literal["linear", "cosine"]
Granularity = Literal["token", "sequence", "batch"]
MixingWeights = Literal["softmax", "equal"]

# Tutel's cosine router, which MoLEx takes over: learned temperature, starting at 0.5, scale never above 100.
_INITIAL_LOG_SCALE = math.log(1 / 0.5)
_MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True)
class Routing:
    """One router's decision for N tokens among E experts, k of them each.

    Attributes:
        logits: scores before the softmax, ``(N, E)``, float32 or wider.
        weights: softmax over all experts, restricted to the k largest and renormalised, or 1/k each, ``(N, k)``.
        indices: the experts those weights belong to, largest first, ``(N, k)``.
        granularity: what each of the N rows decides for.
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor
    granularity: Granularity = "token"

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.logits.shape[-1]

    @property
    def probs(self) -> Tensor:
        """Softmax over all experts, ``(N, E)``."""
        return torch.softmax(self.logits, dim=-1)

    def dense_weights(self) -> Tensor:
        """The weights laid out over all experts, zero where an expert is not used, ``(N, E)``."""
        return torch.zeros_like(self.logits).scatter(-1, self.indices, self.weights)


class Router(nn.Module):
    """Scores E experts for each token and keeps the k best.

    The decision is taken in float32 or wider, whatever the precision of the features.
    ``weight`` has shape ``(E, in)``; ``bias``, where there is one, ``(E,)``.
    """

    mixing_weights: MixingWeights = "softmax"

    def __init__(self, in_features: int, num_experts: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform weight as in MoLA's code, zero bias."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def logits(self, x: Tensor, product: Tensor | None = None) -> Tensor:
        """Scores ``(N, E)`` of tokens ``x (N, in)``.

        Args:
            x: features, ``(N, in)``.
            product: ``x @ weight.T`` where a caller already has it from a GEMM shared with the experts, ``(N, E)``.
        """
        if product is None:
            weight = self.weight if self.weight.dtype is x.dtype else self.weight.to(x.dtype)
            product = nn.functional.linear(x, weight)  # (N, E)
        return self._score(x, _widen(product))

    def _score(self, x: Tensor, product: Tensor) -> Tensor:
        raise NotImplementedError

    def route(self, logits: Tensor, top_k: int) -> Routing:
        """Keeps the ``top_k`` largest of ``logits (N, E)``; ties go to the lower index only as far as topk does.

        A weight of 1/k whatever the logit, as a single expert's is, would tell the router nothing; its gradient is
        that of ``p / stopgrad(p) / k``, p the expert's softmax over all experts, as in MoLEx.
        """
        largest, indices = logits.topk(top_k, dim=-1)  # (N, k), (N, k)
        if top_k == 1 or self.mixing_weights == "equal":
            chance = torch.log_softmax(logits, dim=-1).gather(-1, indices)  # (N, k)
            return Routing(logits=logits, weights=(chance - chance.detach()).exp() / top_k, indices=indices)
        # The softmax over all experts, restricted to k and renormalised, is the softmax over those k logits.
        return Routing(logits=logits, weights=torch.softmax(largest, dim=-1), indices=indices)

    def forward(self, x: Tensor, top_k: int = 1) -> Routing:
        """Routes tokens ``x (N, in)``."""
        return self.route(self.logits(x), top_k)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"in_features={self.in_features}, num_experts={self.num_experts}, bias={self.bias is not None}"


class LinearRouter(Router):
    """``logits = W x (+ b)``: MoLA §4.1 (without bias), MoLEx (with bias)."""

    def _score(self, x: Tensor, product: Tensor) -> Tensor:
        return product if self.bias is None else product + _widen(self.bias)


class CosineRouter(Router):
    """``logits = scale * cos(x, W_e)``, both normalised over the feature axis, with a learned scale.

    The cosine router of Tutel that MoLEx uses, whose published form normalises 3-D input over the sequence axis and so
    lets tokens change each other's logits; here the features of one token alone decide.
    """

    def __init__(self, in_features: int, num_experts: int, bias: bool = False) -> None:
        super().__init__(in_features, num_experts, bias)
        self.log_scale = nn.Parameter(torch.tensor(_INITIAL_LOG_SCALE))

    def _score(self, x: Tensor, product: Tensor) -> Tensor:
        token_norm = _widen(torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=product.dtype))  # (N, 1)
        expert_norm = torch.linalg.vector_norm(self.weight, dim=-1, dtype=product.dtype)  # (E,)
        cosine = product / (token_norm * expert_norm).clamp_min(torch.finfo(product.dtype).tiny)  # (N, E)
        scaled = cosine * self.log_scale.to(product.dtype).clamp(max=_MAX_LOG_SCALE).exp()
        return scaled if self.bias is None else scaled + _widen(self.bias)


class ProjectedCosineRouter(CosineRouter):
    """Tutel's cosine router as MoLEx publishes it: the cosine of a learned projection of x, ``P x + b``, and ``W_e``.

    ``projection.weight`` has shape ``(proj, in)``, ``weight (E, proj)``.
    """

    def __init__(self, in_features: int, num_experts: int, projected: int) -> None:
        super().__init__(projected, num_experts)
        self.projection = nn.Linear(in_features, projected)
        nn.init.normal_(self.weight, std=0.01)

    def logits(self, x: Tensor, product: Tensor | None = None) -> Tensor:
        """Scores ``(N, E)`` of tokens ``x (N, in)``; a product made from ``x`` itself is of no use here."""
        return super().logits(
            nn.functional.linear(x, self.projection.weight.to(x.dtype), self.projection.bias.to(x.dtype))
        )


_ROUTERS: dict[str, type[Router]] = {"linear": LinearRouter, "cosine": CosineRouter}


def make_router(
    kind: str, in_features: int, num_experts: int, bias: bool = False, mixing_weights: MixingWeights = "softmax"
) -> Router:
    """Builds a router by its name in a config.

    Raises:
        LamellaError: the name is unknown.
    """
    if kind not in _ROUTERS:
        raise LamellaError(f"router={kind!r} is unknown; use one of {sorted(_ROUTERS)}.")
    router = _ROUTERS[kind](in_features, num_experts, bias)
    router.mixing_weights = mixing_weights
    return router


def _widen(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float32:
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
