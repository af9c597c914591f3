"""Tensors of adapters: what they are called in a model, and how they are kept there."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from lamella.backbones.offloading import execution_device
from lamella.errors import LamellaError
from lamella.routing import Asked, Generation, RoutedCall
from lamella.tuners.bypassing import read_weight


class _Held(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}"


class AdapterTensors(nn.ModuleDict):
    """One tensor for each adapter, called ``<this>.<adapter>.weight`` in a model.

    So PEFT's LoRA calls its matrices: who copies an adapter by the names of parameters replaces ``.default.`` by
    ``.ref.``, and would overlook a name that ends in the adapter's. A file has no adapter's name, and calls the tensor
    ``<this>``.
    """

    def put(self, adapter: str, value: Tensor) -> None:
        """Sets an adapter's tensor."""
        self[adapter] = _Held(value)

    def of(self, adapter: str) -> nn.Parameter:
        """An adapter's tensor."""
        held = cast(_Held, self._modules[adapter])
        weight = held._parameters.get("weight")  # sooner found than by the attribute, which may be no parameter's
        return held.weight if weight is None else weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for adapter in self:  # the names of the first edition, in a whole model's state
            if f"{prefix}{adapter}" in state_dict:
                state_dict[f"{prefix}{adapter}.weight"] = state_dict.pop(f"{prefix}{adapter}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class AdapterLayer(BaseTunerLayer):
    """A layer that keeps its adapters' tensors where it computes."""

    # What BaseTunerLayer, which is untyped, brings along.
    adapter_layer_names: tuple[str, ...]
    active_adapters: list[str]
    disable_adapters: bool
    _disable_adapters: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]

    is_watched = True
    weight = property(read_weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        home = device or execution_device(self.get_base_layer())
        super()._move_adapter_to_device_of_base_layer(adapter_name, home)
        if home is not None:  # PEFT leaves it where it is if another adapter is offloaded
            for held in (getattr(self, name) for name in self.adapter_layer_names):
                if adapter_name in held and not is_meta(held[adapter_name]):
                    held[adapter_name].to(home)


def is_meta(module: nn.Module) -> bool:
    """Whether some of a module's parameters have no numbers."""
    return any(p.is_meta for p in module.parameters())


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's forward is ``W x + b`` of plain tensors and nothing else, so that its matrix may be used alone.

    A quantised or distributed weight is a subclass of a tensor, which answers the operations that its own layer asks
    for; a hook, or another forward put in its place, may do anything.
    """
    if type(layer) not in (nn.Linear, Conv1D) or "forward" in layer.__dict__:
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooked and {type(tensor) for tensor in layer._parameters.values()} <= {nn.Parameter, type(None)}


def say_if_rounded(model: nn.Module) -> None:
    """Warns where an adapter is loaded on a quantised base whose other weights are in half precision.

    Training usually had them in float32, and a router's choice between experts that score alike turns with rounding.
    """
    quantised: str | None = None
    halves: set[torch.dtype] = set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            weight = getattr(module.get_base_layer(), "weight", None)
            if isinstance(weight, Tensor) and not weight.is_floating_point():
                quantised = quantised or name
        halves |= {p.dtype for p in module.parameters(recurse=False) if p.dtype in (torch.bfloat16, torch.float16)}
    if quantised is not None and halves:
        kinds = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in halves))
        warnings.warn(
            f"The base is quantised ({quantised}) and has weights in {kinds}. If the adapter was trained after "
            "peft.prepare_model_for_kbit_training, which makes those float32, call it before loading, too: where "
            "experts score alike, a router chooses others by rounding, and outputs move much more than a LoRA's would.",
            stacklevel=2,
        )


@contextmanager
def placed(model: nn.Module) -> Iterator[None]:
    """Lets offloaded weights look as if they lay where they are used, since PEFT puts an adapter beside its layer's.

    Raises:
        LamellaError: accelerate brings in the weights of a whole module by their names, which an injection changes.
    """
    offloaded = []
    for name, module in model.named_modules():
        device = execution_device(module)
        if device is None:
            continue
        if module.__dict__["_hf_hook"].place_submodules:
            raise LamellaError(
                f"accelerate brings in the weights of {name or 'the model'} as a whole, by names that an adapter "
                "changes. Offload without preload_module_classes, or put the adapter on first."
            )
        for leaf, p in module.named_parameters(recurse=False):
            if p.is_meta and type(p) is nn.Parameter:  # a quantised one is asked for more than its place
                offloaded.append((module, leaf, p))
                stands_in = torch.full((), torch.nan if p.is_floating_point() else 0, dtype=p.dtype, device=device)
                module._parameters[leaf] = nn.Parameter(stands_in.expand(p.shape), p.requires_grad)
    try:
        yield
    finally:
        for module, leaf, parameter in offloaded:
            stood_in = module._parameters[leaf]
            assert stood_in is not None
            module._parameters[leaf] = parameter.requires_grad_(stood_in.requires_grad)


def with_numbers(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by name, those that are offloaded as accelerate keeps them."""
    if not any(tensor.is_meta for tensor in tensors.values()):
        return tensors
    kept = {
        f"{name}.{leaf}": module.__dict__["_hf_hook"].weights_map[leaf]
        for name, module in model.named_modules()
        if has_offloaded_params(module)
        for leaf, tensor in module.state_dict(prefix="").items()
        if tensor.is_meta and f"{name}.{leaf}" in tensors
    }
    return {name: kept.get(name, tensor) for name, tensor in tensors.items()}


class LostGradients:
    """Refuses a backward pass to parameters that are offloaded: their gradients would go to a copy that is gone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def asked(self, generation: Generation, asked: Asked, arguments: dict[str, Any]) -> dict[str, Any]:
        """Generation trains nothing."""
        return arguments

    def batched(self, model: nn.Module) -> None:
        """Nor does this."""

    def opened(self, call: RoutedCall, arguments: Mapping[str, Any]) -> None:
        """Nothing is known yet."""

    def closed(self, call: RoutedCall, output: Any) -> None:
        """Watches the outputs of a call that can be trained."""
        if not torch.is_grad_enabled() or not any(p.is_meta and p.requires_grad for p in self.model.parameters()):
            return
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad and not value.is_meta:
                value.register_hook(self._refuse)

    def _refuse(self, grad: Tensor) -> NoReturn:
        name = next(name for name, p in self.model.named_parameters() if p.is_meta and p.requires_grad)
        raise LamellaError(
            f"{name} is set to train and offloaded by accelerate, so that its gradient would be lost. Offload the base "
            "first and put the adapter on then (get_peft_model, or PeftModel.from_pretrained with is_trainable=True): "
            "its tensors stay where the model computes."
        )
