"""Which modules a config asks for, checked before the first one is touched."""

import difflib
from collections.abc import Sequence

from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from lamella.backbones import Stack, find_place, rehearse
from lamella.errors import LamellaError

ONLY_READ = "its weight is read without calling it, so that an adapter there has no effect"


def check_targets(model: nn.Module, config: PeftConfig, stacks: Sequence[Stack], outside: bool = False) -> None:
    """Refuses targets that would adapt less than was asked for, or a module that is not linear.

    Args:
        model: the model.
        config: names the targets.
        stacks: the model's stacks of blocks.
        outside: whether modules outside the blocks are adapted too.

    Raises:
        LamellaError: nothing matches, one of several names matches nothing, all matches lie where nothing is adapted,
            or a match where something is adapted is not linear.
    """
    targets = config.target_modules
    if targets == "all-linear":
        return
    modules = {name: module for name, module in _outside_adapters(model).items() if name}
    if isinstance(targets, set | list):
        _refuse_misspelt(targets, list(modules), type(model).__name__)
    matched = [name for name in modules if check_target_module_exists(config, name)]
    if not matched:
        raise LamellaError(
            f"target_modules={targets!r} matches no module of {type(model).__name__}, given exclude_modules, "
            "modules_to_save and layers_to_transform. Name linear modules inside the blocks, or use 'all-linear'."
        )
    meant = [name for name in matched if outside or find_place(name, stacks) is not None]
    if not meant:
        blocks = f"the blocks of {', '.join(stack.name for stack in stacks)}" if stacks else "any block"
        raise LamellaError(
            f"target_modules={targets!r} matches only modules outside {blocks}, such as {matched[0]}; name linear "
            "modules inside the blocks."
        )
    for name in meant:
        module = modules[name]
        base: nn.Module = BaseTunerLayer.get_base_layer(module)  # itself where it has no adapter
        if not isinstance(base, Conv1D) and not hasattr(base, "in_features"):  # quantised layers have it too
            raise LamellaError(
                f"{name} is a {type(base).__name__}, which is not a linear layer; name linear modules in "
                "target_modules, or put it into exclude_modules."
            )


def only_read(model: nn.Module, stacks: Sequence[Stack]) -> frozenset[str]:
    """Linear modules whose weights the model reads without calling them, so that no adapter around them is seen."""
    modules = _outside_adapters(model)
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    return rehearse(model, stacks, linear).only_read


def usual_lora_targets(model: nn.Module) -> set[str]:
    """What PEFT's LoRA adapts in a model of this type when nothing is named.

    Raises:
        LamellaError: PEFT does not know the type.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    targets = LoraModel.target_module_mapping.get(model_type)
    if targets is None:
        raise LamellaError(
            f"LoRA is given no target_modules, and PEFT knows none for model_type={model_type!r}; name the linear "
            "modules in LoRA's target_modules, or set it to 'all-linear'."
        )
    return {targets} if isinstance(targets, str) else set(targets)


def _outside_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name, without what lies inside the layers of adapters that are already there."""
    modules = dict(model.named_modules())
    adapted = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    return {name: module for name, module in modules.items() if not name.startswith(adapted)}


def _refuse_misspelt(targets: set[str] | list[str], names: list[str], model: str) -> None:
    """Each name must match a module: a misspelt one would silently train less than asked."""
    missing = sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names))
    if not missing:
        return
    ends = {name.rpartition(".")[2] for name in names}
    near = {t: difflib.get_close_matches(t, ends, n=1) for t in missing}
    said = ", ".join(f"{t!r}" + (f" (did you mean {near[t][0]!r}?)" if near[t] else "") for t in missing)
    raise LamellaError(f"target_modules names {said}, which no module of {model} matches.")
