"""Modules that no adapter can act on, first those whose weight is read by what does not call them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lamella.backbones import Rehearsal, computes, views
from lamella.routing import Frame, current_frame

_READ = BaseTunerLayer.weight.fget
# What is done with a module that an adapter has no effect on, or not all of it.
_ONLY_READ = "reads its weight without calling it, so that an adapter there has no effect"
_ALSO_READ = "calls it and computes with its weight beside that, where an adapter has no effect"
_MORE = "it puts out more than a tensor, to which an adapter could add"  # such as a router that chooses, too


class _Watched(Tensor):
    """A layer's weight, or a view of it, that says when something is computed with it."""

    _used: Callable[[], None]

    @classmethod
    def of(cls, weight: Tensor, used: Callable[[], None]) -> "_Watched":
        """The weight, which calls ``used``."""
        watched = weight.as_subclass(cls)
        watched.__dict__.update(vars(weight), _used=used, _is_param=isinstance(weight, nn.Parameter))
        return watched

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            output = func(*args, **(kwargs or {}))
            weights = [one for one in tree_leaves((args, kwargs)) if isinstance(one, _Watched)]
            if computes(weights, output):
                for weight in weights:
                    weight._used()
            watching = {id(view): weight._used for weight in weights for view in views(weight, output)}
            return tree_map(lambda one: cls.of(one, watching[id(one)]) if id(one) in watching else one, output)


def read_weight(layer: Any) -> Tensor:
    """A layer's weight, for a module around it. Where that computes with it in a forward, it is refused.

    Not where it is known from the beginning that the layer is never called (``is_watched``). Of a weight that cannot
    be watched, such as a quantised one, it is refused where the layer is not called beside that.
    """
    weight: Tensor = _READ(layer)
    frame, is_on = current_frame(), layer.is_watched and not layer.disable_adapters
    if frame is None or not is_on or not {*layer.active_adapters} & {*layer._all_available_adapter_names()}:
        return weight
    if type(weight) is not nn.Parameter or torch.compiler.is_compiling():
        frame.call.read.append(layer)
        return weight
    return _Watched.of(weight, partial(frame.call.used.append, layer))


def note_call(layer: nn.Module, frame: Frame | None) -> None:
    """Notes that a layer runs in this forward."""
    if frame is not None:
        frame.call.called.add(layer)


def why_unfit(model: nn.Module, seen: Rehearsal) -> dict[str, str]:
    """By name the modules that no adapter can act on, and why: such as ``out_proj`` in torch's attention."""
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    of_torch = {f"{name}.out_proj".removeprefix("."): f"MultiheadAttention {_ONLY_READ}" for name in attentions}
    of_model = dict.fromkeys(seen.only_read, f"the model {_ONLY_READ}") | dict.fromkeys(seen.other_outputs, _MORE)
    return dict.fromkeys(seen.also_read, f"the model {_ALSO_READ}") | of_model | of_torch


def leave_fast_paths(model: nn.Module) -> None:
    """Has torch's encoder layers call the modules with adapters in evaluation too, as they do in training."""
    for module in model.modules():
        if not any(isinstance(inner, BaseTunerLayer) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no activation that the fast path knows
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # a nested tensor can go through the fast path alone
