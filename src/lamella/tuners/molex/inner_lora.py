"""The LoRA inside the blocks, injected by PEFT from MoLEx's own config."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor, nn

from lamella.backbones import Stack, find_place, rehearse
from lamella.errors import LamellaError
from lamella.routing import current_frame
from lamella.tuners.bypassing import note_call, read_weight, why_unfit
from lamella.tuners.config import wrote_before
from lamella.tuners.molex.config import MolexConfig
from lamella.tuners.targets import (
    Selection,
    check_names,
    check_targets,
    linear_modules,
    usual_lora_targets,
    warn_of_left_out,
)

_OUTSIDE = "outside the blocks, where no guest could run it; train it with modules_to_save"


class LoraLinear(Linear):
    """PEFT's layer, which notices who reads its weight without calling it."""

    is_watched = True
    weight = property(read_weight)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        note_call(self, current_frame())
        output: Tensor = super().forward(*args, **kwargs)
        return output


def find_targets(model: nn.Module, config: MolexConfig, stacks: Sequence[Stack]) -> tuple[list[str], list[str]]:
    """The modules that the LoRA adapts, and those that match but lie outside the blocks.

    Args:
        model: the model, with its bare blocks in place.
        config: MoLEx's settings, with a LoRA.
        stacks: its stacks.

    Raises:
        LamellaError: the LoRA names modules that are not there or not linear, or names none for an unknown model.
    """
    assert config.lora is not None
    lora = copy.deepcopy(config.lora)
    if lora.target_modules is None and lora.target_parameters is None:
        lora.target_modules = usual_lora_targets(model)
    lora.inference_mode = config.inference_mode
    selection = Selection(model, lora, stacks, as_saved=wrote_before(config, "0.2"))
    check_names(model, lora)
    unseen = why_unfit(model, rehearse(model, stacks, linear_modules(model)))
    check_targets(model, lora, selection, unseen)
    unseen = {} if selection.as_saved else unseen
    is_named = lora.target_modules != "all-linear"
    lora.task_type = config.task_type  # says which head is not among "all-linear"
    _maybe_include_all_linear_layers(lora, model)
    inside_adapters = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLayer))
    matched = [
        name for name, _ in model.named_modules() if name and not name.startswith(inside_adapters) and selection(name)
    ]
    inside = [name for name in matched if find_place(name, stacks) is not None and name not in unseen]
    outside = [name for name in matched if name not in inside]
    if not inside and not lora.target_parameters:
        raise LamellaError(
            f"The blocks of {', '.join(stack.name for stack in stacks)} hold no linear module that the LoRA of MoLEx "
            "could adapt, so nothing would be trained in them. Use lora=None, which trains the routers alone."
        )
    loud = outside if is_named and not selection.as_saved else [name for name in outside if name in unseen]
    if not config.inference_mode:
        warn_of_left_out("MoLEx", [(name, unseen.get(name, _OUTSIDE)) for name in loud])
    return inside, outside


def inject_lora(
    model: nn.Module, config: MolexConfig, adapter: str, targets: list[str], active: list[str], low_cpu_mem_usage: bool
) -> None:
    """Puts the LoRA on its targets, and leaves the adapters already there as they were.

    Args:
        model: the model, with its bare blocks in place.
        config: MoLEx's settings, with a LoRA.
        adapter: the adapter's name.
        targets: names of the modules.
        active: the adapters that are active.
        low_cpu_mem_usage: whether to leave the new tensors on the meta device, for a file that is loaded next.
    """
    lora = copy.deepcopy(config.lora)
    assert isinstance(lora, LoraConfig)
    lora.target_modules = set(targets)
    lora.exclude_modules = lora.layers_to_transform = lora.layers_pattern = None
    lora.inference_mode = config.inference_mode
    if not config.init_lora_weights:
        lora.init_lora_weights = False
    had_adapters = any(isinstance(module, LoraLayer) for module in model.modules())
    before = [(p, p.requires_grad) for p in model.parameters()] if had_adapters else []
    with _without_configs(model):
        LoraModel(model, lora, adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    for layer in lora_layers(model):
        layer.set_adapter(active, inference_mode=config.inference_mode)
        if type(layer) is Linear and not wrote_before(config, "0.2"):
            layer.__class__ = LoraLinear
    for parameter, requires_grad in before:
        parameter.requires_grad = requires_grad


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The modules that carry a LoRA."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@contextmanager
def _without_configs(model: nn.Module) -> Iterator[None]:
    """Hides the model's adapter configs: a tuner takes those it finds there for its own."""
    configs = model.__dict__.pop("peft_config", None)
    try:
        yield
    finally:
        model.__dict__.pop("peft_config", None)
        if configs is not None:
            model.peft_config = configs
