"""Every family that follows transformers' contract for experts, whatever it is called."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamella.backbones.moe.expert import Activation, Expert, Gated, HoldsExperts, NormedExpert, ungated
from lamella.backbones.moe.family import MoEFamily, bare, register
from lamella.errors import LamellaError


@register
class Contract(MoEFamily):
    """Experts that transformers runs by ``use_experts_implementation``, or that are kept as those are.

    One module, called experts, has the matrices of all, with flags that say how they lie, and its own ``_apply_gate``;
    it is given the final indices and weights. Beside it is a router, whose first output is its logits.
    """

    def holds(self, module: nn.Module) -> bool:
        experts = module._modules.get("experts")
        if self.sparse and not super().holds(module):  # of a family that adds something
            return False
        if experts is None or not any(name in module._modules for name in self.routers):
            return False
        return isinstance(experts, HoldsExperts) or _follows(bare(experts))

    def expert(self, sparse: nn.Module, index: int) -> Expert:
        """One expert, by views of the stacked parameters.

        Raises:
            LamellaError: they are quantised.
        """
        experts = bare(self.experts(sparse))
        _refuse_quantised(experts)
        first, gated = ("gate_up_proj", True) if getattr(experts, "has_gate", True) else ("up_proj", False)
        both, down = _matrix(experts, first, index), _matrix(experts, "down_proj", index)  # (2*ff, h), (h, ff)
        bias, down_bias = _bias(experts, first, index), _bias(experts, "down_proj", index)  # (2*ff,), (h,)
        if gated:
            gate, up = _halves(experts, both)
            gate_bias, up_bias = (None, None) if bias is None else _halves(experts, bias)
            made = Expert(up, down, _activation(experts), gate, gate_bias, up_bias, down_bias)
        else:
            made = Expert(both, down, ungated(experts.act_fn), up_bias=bias, down_bias=down_bias)
        if getattr(experts, "has_post_expert_norm", False):
            return NormedExpert(**vars(made), norm=experts.post_expert_norm)
        return made


def _follows(experts: Any) -> bool:
    """Whether a module has what transformers' functions for experts read of it."""
    return hasattr(experts, "_apply_gate") and isinstance(getattr(experts, "down_proj", None), Tensor)


def _refuse_quantised(experts: nn.Module) -> None:
    for name, parameter in experts.named_parameters(recurse=False):
        if not parameter.is_floating_point() or parameter.element_size() < 2 or "_scale" in name:
            raise LamellaError(
                f"The experts of this {type(experts).__name__} are quantised ({name} is {parameter.dtype}), so their "
                "parameters alone are not what they compute with. Load the model with dequantize=True in its "
                "quantization config, or in bfloat16."
            )


def _matrix(experts: Any, name: str, index: int) -> Tensor:
    matrix: Tensor = getattr(experts, name)[index]
    return matrix.t() if getattr(experts, "is_transposed", False) else matrix


def _bias(experts: Any, name: str, index: int) -> Tensor | None:
    return getattr(experts, f"{name}_bias")[index] if getattr(experts, "has_bias", False) else None


def _halves(experts: Any, both: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, ``(2*ff, ...) -> (ff, ...)`` each: one after the other, or by turns."""
    if not getattr(experts, "is_concatenated", True):
        return both[::2], both[1::2]
    ff = len(both) // 2
    return both[:ff], both[ff:]


def _activation(experts: Any) -> Activation:
    """The gating of the experts' class: the plain one by its activation, another by its own method."""
    if getattr(type(experts)._apply_gate, "__name__", "") == "_default_apply_gate":
        return Gated(experts.act_fn)
    return _OwnGate(_shell(experts), getattr(experts, "is_concatenated", True))


@dataclass(frozen=True)
class _OwnGate:
    """``_apply_gate`` of the class of the experts, which reads gate and up as the parameters have them."""

    experts: Any
    concatenated: bool

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """The hidden units ``(N, ff)``."""
        assert gate is not None
        both = torch.cat([gate, up], dim=-1) if self.concatenated else torch.stack([gate, up], dim=-1).flatten(-2)
        hidden: Tensor = self.experts._apply_gate(both)  # (N, ff) of (N, 2*ff)
        return hidden


def _shell(experts: nn.Module) -> nn.Module:
    """The module without its parameters, which an activation would keep in memory."""
    shell = object.__new__(type(experts))
    shell.__dict__.update(experts.__dict__, _parameters={}, _buffers={})
    return shell
