"""Which modules and blocks a config asks for, checked before the first module is touched."""

import copy
import difflib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from lamella.backbones import Stack, find_place
from lamella.errors import LamellaError

# What PEFT adds to modules_to_save by a task_type, whether the model has it or not.
_HEADS_OF_TASKS = frozenset({"classifier", "score", "qa_outputs"})
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Selection:
    """Which modules of a model a config asks for: by PEFT's rules, and by blocks where it names indices.

    PEFT takes an index from a module's name, and asks for none where a module is named in full, as "all-linear" names
    them; here an index is that of a block in its stack.

    Args:
        model: the model.
        config: the names.
        stacks: the model's stacks of blocks.
        as_saved: whether an edition wrote the config that took PEFT's rules as they are.

    Raises:
        LamellaError: ``layers_to_transform`` or ``layers_pattern`` names what the model does not have.
    """

    def __init__(self, model: nn.Module, config: PeftConfig, stacks: Sequence[Stack], as_saved: bool = False) -> None:
        self.stacks, self.as_saved = stacks, as_saved
        self.config, self.rules = config, copy.copy(config)
        self.blocks: Mapping[str, Collection[int]] | None = None
        if config.layers_to_transform is not None and not as_saved:
            self.blocks = {stack.name: layers for stack, layers in chosen_blocks(model, config, stacks)}
            self.rules.layers_to_transform = self.rules.layers_pattern = None

    def __call__(self, name: str) -> bool | _ExcludedModule:
        """Whether a module is asked for; an `_ExcludedModule`, which is false, where the config leaves it out."""
        self.rules.target_modules = self.config.target_modules  # PEFT replaces "all-linear"
        match = check_target_module_exists(self.rules, name)
        return match if isinstance(match, _ExcludedModule) else bool(match) and self.in_blocks(name)

    def leaves_out(self, name: str) -> bool:
        """Whether the config leaves a module out that something else asks for."""
        rules = copy.copy(self.rules)
        rules.target_modules = {name}
        match = check_target_module_exists(rules, name)
        return not match or isinstance(match, _ExcludedModule) or not self.in_blocks(name)

    def in_blocks(self, name: str) -> bool:
        """Whether a module lies in the blocks that are asked for."""
        if self.blocks is None:
            return True
        place = find_place(name, self.stacks)
        return place is not None and place.layer in self.blocks.get(place.stack, ())


def chosen_blocks(model: nn.Module, config: PeftConfig, stacks: Sequence[Stack]) -> list[tuple[Stack, list[int]]]:
    """The blocks that ``layers_to_transform`` and ``layers_pattern`` ask for, by stack; all where they are None.

    Raises:
        LamellaError: a pattern that names no stack, no index at all, or one that no stack has.
    """
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    meant = [s for s in stacks if not patterns or any(_ends_with(s.name, pattern) for pattern in patterns)]
    asked = config.layers_to_transform
    if patterns and not meant:
        raise LamellaError(
            f"layers_pattern={config.layers_pattern!r} names none of the stacks of {type(model).__name__}: "
            f"{', '.join(stack.name for stack in stacks) or 'it has none'}."
        )
    if asked is None:
        return [(stack, list(range(stack.depth))) for stack in meant]
    layers = sorted({asked} if isinstance(asked, int) else set(asked))
    depth = max((stack.depth for stack in meant), default=0)
    if not layers or layers[0] < 0 or layers[-1] >= depth:
        sizes = ", ".join(f"{stack.name} has {stack.depth} blocks" for stack in meant) or "there is no stack of blocks"
        raise LamellaError(
            f"layers_to_transform={asked!r} does not fit {type(model).__name__}: {sizes}, counted from 0. Name blocks "
            "that it has, or leave the setting out, which means all."
        )
    return [(stack, chosen) for stack in meant if (chosen := [layer for layer in layers if layer < stack.depth])]


def _ends_with(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def check_names(model: nn.Module, config: PeftConfig, meant: Collection[str] = ()) -> None:
    """Refuses names in ``exclude_modules`` and ``modules_to_save`` that no module has: they would do nothing.

    A config that is loaded to infer with may have them: what its adapter consists of is settled by its file.

    Args:
        model: the model.
        config: the names.
        meant: what ``exclude_modules`` may name, where that is not any module.

    Raises:
        LamellaError: a name or a regular expression that nothing matches.
    """
    if config.inference_mode:  # PEFT loads so
        return
    names = [name for name in _outside_adapters(model) if name]
    excluded, kind = config.exclude_modules, type(model).__name__
    candidates = list(meant) or names
    what = "block" if meant else "module"
    if isinstance(excluded, str) and not any(re.fullmatch(excluded, name) for name in candidates):
        raise LamellaError(f"exclude_modules={excluded!r} matches no {what} of {kind}; correct it, or leave it out.")
    if isinstance(excluded, set | list):
        _refuse_misspelt("exclude_modules", excluded, candidates, kind, what)
    heads = set(config.modules_to_save or ()) - (_HEADS_OF_TASKS if config.task_type else set())
    plain = {head for head in heads if head.replace(".", "").isidentifier()}  # PEFT takes patterns too
    _refuse_misspelt("modules_to_save", plain, names, kind)


def check_targets(
    model: nn.Module, config: PeftConfig, selection: Selection, unfit: Mapping[str, str], outside: bool = False
) -> None:
    """Refuses targets that would adapt less than was asked for, or a module that is not linear.

    Args:
        model: the model.
        config: names the targets.
        selection: which modules it asks for.
        unfit: those that no adapter has an effect on, and why.
        outside: whether modules outside the blocks are adapted too.

    Raises:
        LamellaError: nothing matches, one of several names matches nothing, all matches lie where nothing is adapted,
            or a match where something is adapted is not linear, or is never called by the module that it lies in.
    """
    targets, stacks = config.target_modules, selection.stacks
    fused = [] if config.inference_mode else list(_fused_weights(model, selection))
    if targets == "all-linear":
        _warn_of_fused(fused)
        return
    modules = {name: module for name, module in _outside_adapters(model).items() if name}
    if isinstance(targets, set | list):
        hint = f" Several matrices, as of experts, lie in {fused[0]}, which is no linear module." if fused else ""
        _refuse_misspelt("target_modules", targets, list(modules), type(model).__name__, hint=hint)
    matched = [name for name in modules if selection(name)]
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
        if name in unfit and not selection.as_saved:
            raise LamellaError(
                f"{name} cannot be adapted: {unfit[name]}. Leave it out of target_modules, or put it into "
                "exclude_modules."
            )
    _warn_of_fused([weight for weight in fused if any(name.startswith(_owners_parent(weight)) for name in meant)])


def warn_of_left_out(method: str, skipped: Sequence[tuple[str, str]]) -> None:
    """Says which modules have no adapter though they were asked for: a line in a summary is easily missed."""
    if skipped:
        said = "; ".join(f"{name} ({reason})" for name, reason in skipped)
        warnings.warn(f"{method} does not adapt {said}.", stacklevel=2)


def linear_modules(model: nn.Module) -> list[str]:
    """The names of all linear modules that have no adapter."""
    return [name for name, module in _outside_adapters(model).items() if isinstance(module, nn.Linear | Conv1D)]


def usual_lora_targets(model: nn.Module) -> set[str]:
    """What PEFT's LoRA adapts in a model of this type when nothing is named.

    Raises:
        LamellaError: PEFT does not know the type.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    targets = LoraModel.target_module_mapping.get(model_type)
    if targets is None:
        raise LamellaError(
            f"No target_modules are given, and PEFT knows none for model_type={model_type!r}; name the linear "
            "modules in target_modules, or set it to 'all-linear'."
        )
    return {targets} if isinstance(targets, str) else set(targets)


def _outside_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name, without what lies inside the layers of adapters that are already there."""
    modules = dict(model.named_modules())
    adapted = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    return {name: module for name, module in modules.items() if not name.startswith(adapted)}


def _refuse_misspelt(
    setting: str, given: Collection[str], names: Sequence[str], model: str, what: str = "module", hint: str = ""
) -> None:
    """Each name must match something: a misspelt one would silently do less than asked."""
    missing = sorted(t for t in given if not any(_ends_with(name, t) for name in names))
    if not missing:
        return
    ends = {name.rpartition(".")[2] for name in names}
    near = {t: difflib.get_close_matches(t, ends, n=1) for t in missing}
    said = ", ".join(f"{t!r}" + (f" (did you mean {near[t][0]!r}?)" if near[t] else "") for t in missing)
    raise LamellaError(f"{setting} names {said}, which no {what} of {model} matches.{hint}")


def _fused_weights(model: nn.Module, selection: Selection) -> Iterator[str]:
    """Weights of several experts in one tensor, in blocks that are asked for: no linear module has them."""
    for name, module in _outside_adapters(model).items():
        is_left_out: Any = isinstance(module, (BaseTunerLayer, *_CONVOLUTIONS))
        if is_left_out or find_place(f"{name}.weight", selection.stacks) is None or selection.leaves_out(name):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 2 and min(parameter.shape) > 1:
                yield f"{name}.{own}"


def _owners_parent(weight: str) -> str:
    """What the modules beside ``mlp.experts`` start with, for ``mlp.experts.down_proj``."""
    return f"{weight.rsplit('.', 2)[0]}."


def _warn_of_fused(weights: Sequence[str]) -> None:
    if weights:
        kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", weight) for weight in weights)
        owner = weights[0].rsplit(".", 2)[-2]
        warnings.warn(
            f"No linear module has the weights {', '.join(kinds)}, where several matrices lie in one tensor, as of "
            f"experts: they stay as they are, whatever is adapted beside them. exclude_modules=[{owner!r}] says that "
            "this is meant.",
            stacklevel=2,
        )
