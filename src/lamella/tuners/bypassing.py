"""Modules that no adapter can act on, first those whose weight is read by what does not call them."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lamella.backbones import Rehearsal
from lamella.routing import Frame, current_frame

# What is done with a module that an adapter has no effect on.
_ONLY_READ = "reads its weight without calling it, so that an adapter there has no effect"
_MORE = "it puts out more than a tensor, to which an adapter could add"  # such as a router that chooses, too


def read_weight(layer: Any) -> Tensor:
    """A layer's weight, for a module around it. Where that has not called the layer in a forward, it is refused.

    Not where it is known from the beginning that the layer is never called (``is_watched``).
    """
    weight: Tensor = BaseTunerLayer.weight.fget(layer)
    frame, is_on = current_frame(), layer.is_watched and not layer.disable_adapters
    if frame is not None and is_on and {*layer.active_adapters} & {*layer._all_available_adapter_names()}:
        frame.call.read.append(layer)
    return weight


def note_call(layer: nn.Module, frame: Frame | None) -> None:
    """Notes that a layer runs in this forward."""
    if frame is not None:
        frame.call.called.add(layer)


def why_unfit(model: nn.Module, seen: Rehearsal) -> dict[str, str]:
    """By name the modules that no adapter can act on, and why: such as ``out_proj`` in torch's attention."""
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    of_torch = {f"{name}.out_proj".removeprefix("."): f"MultiheadAttention {_ONLY_READ}" for name in attentions}
    of_model = dict.fromkeys(seen.only_read, f"the model {_ONLY_READ}") | dict.fromkeys(seen.other_outputs, _MORE)
    return of_model | of_torch


def leave_fast_paths(model: nn.Module) -> None:
    """Has torch's encoder layers call the modules with adapters in evaluation too, as they do in training."""
    for module in model.modules():
        if not any(isinstance(inner, BaseTunerLayer) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no activation that the fast path knows
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # a nested tensor can go through the fast path alone
