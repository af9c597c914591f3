"""From the module names a LoRA was trained under to those of the model at hand."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D

from lamella.adapters.bases import published_name
from lamella.adapters.source import Factors, LoraSource
from lamella.errors import LamellaError


class Mapped(NamedTuple):
    """A LoRA on a model.

    Attributes:
        modules: factors by the model's module names. A module may be a 1x1 convolution: its features are its channels.
        skipped: what of the LoRA is not on this model, and why.
        renamed: how its module names were changed to be found; empty where they are the model's own.
    """

    modules: dict[str, Factors]
    skipped: list[tuple[str, str]]
    renamed: str


def map_to(model: nn.Module, source: LoraSource, component: str | None = None) -> Mapped:
    """Finds the module of each of a LoRA's factors and checks that they fit.

    Where all names of the LoRA share a first part that the model lacks, or lack the model's own, it is taken off or put
    before all of them.

    Args:
        model: the base model.
        source: the LoRA.
        component: which of the LoRA's components is for this model; None where only one fits.

    Raises:
        LamellaError: modules that the model does not have or that are not linear, other widths, or no component or
            several for this model.
    """
    modules = {name: BaseTunerLayer.get_base_layer(module) for name, module in model.named_modules()}
    component = component or _component_for(model, source, modules)
    if component not in source.components:
        raise LamellaError(f"{source.described} has nothing for {component}: it holds {', '.join(source.components)}.")
    factors = source.components[component]
    renaming, renamed = _renaming(model, list(factors), modules)
    mapped: dict[str, Factors] = {}
    unmapped, unfit = [], []
    for name, lora in factors.items():
        ours = renaming(name)
        features = _features(modules[ours]) if ours in modules else None
        if ours not in modules:
            unmapped.append(name)
        elif features is None:
            unfit.append(f"{ours} is a {type(modules[ours]).__name__}, not a linear layer")
        elif features != (lora.A.shape[1], lora.B.shape[0]):
            unfit.append(
                f"{ours} maps {features[0]} features to {features[1]}, the LoRA's {lora.A.shape[1]} to "
                f"{lora.B.shape[0]}"
            )
        else:
            mapped[ours] = lora
    if unmapped:
        raise LamellaError(
            f"{source.described} adapts {len(unmapped)} of {len(factors)} modules that {_called(model)} does not "
            f"have, first {', '.join(unmapped[:3])}. It was trained on {_base(source)}; compose it on that one."
        )
    if unfit:
        raise LamellaError(
            f"{source.described} was trained on {_base(source)} and does not fit "
            f"{_called(model)}: {unfit[0]}{f', and {len(unfit) - 1} more' if unfit[1:] else ''}. Compose only LoRAs "
            "of one base, on that base."
        )
    others = [(name, "for another component of the pipeline") for name in source.components if name != component]
    return Mapped(mapped, [*source.skipped, *others], renamed)


def check_base(model: nn.Module, source: LoraSource) -> None:
    """Compares the base a LoRA names with the model's own name; what has no name is compared by its shapes alone.

    Raises:
        LamellaError: they are two models.
    """
    ours = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    if source.format != "PEFT" or not source.base or not ours:
        return  # kohya names a family or a file
    if source.base == str(ours):
        return
    named, here = published_name(source.base), published_name(str(ours))
    if named != here and Path(named).parts[-1:] != Path(here).parts[-1:]:
        raise LamellaError(
            f"{source.described} was trained on {named}, and the model here is {here}. On other weights of the same "
            "shapes a LoRA loads without a word and answers nonsense: compose it on its own base, or, if that is the "
            "same model under another name, correct base_model_name_or_path in its adapter_config.json."
        )


def _component_for(model: nn.Module, source: LoraSource, modules: Mapping[str, nn.Module]) -> str:
    """The component whose modules the model has, in the right widths."""
    if len(source.components) == 1:
        return next(iter(source.components))
    fitting = [name for name, factors in source.components.items() if _fits(model, factors, modules)]
    if len(fitting) == 1:
        return fitting[0]
    raise LamellaError(
        f"{source.described} holds {', '.join(source.components)}; "
        + (f"{' and '.join(fitting)} fit" if fitting else "none fits")
        + f" {_called(model)}. Say which component the model is, or compose it on the LoRA's own base."
    )


def _fits(model: nn.Module, factors: Mapping[str, Factors], modules: Mapping[str, nn.Module]) -> bool:
    renaming, _ = _renaming(model, list(factors), modules)
    return all(
        (ours := renaming(name)) in modules and _features(modules[ours]) == (lora.A.shape[1], lora.B.shape[0])
        for name, lora in factors.items()
    )


def _renaming(model: nn.Module, names: list[str], modules: Mapping[str, nn.Module]) -> tuple[Callable[[str], str], str]:
    """The first change of prefix under which the model has all the names; none where there is no such change."""
    for renaming, said in _renamings(model, names):
        if all(renaming(name) in modules for name in names):
            return renaming, said
    return str, ""


def _renamings(model: nn.Module, names: list[str]) -> Iterator[tuple[Callable[[str], str], str]]:
    yield str, ""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if prefix != ".":
        yield (lambda name: prefix + name), f"{prefix} put before each name"
    first = f"{names[0].partition('.')[0]}."
    if all(name.startswith(first) for name in names):
        yield (lambda name: name.removeprefix(first)), f"{first} taken off each name"
        if prefix != ".":
            yield (lambda name: prefix + name.removeprefix(first)), f"{first} replaced by {prefix} in each name"


def _features(module: nn.Module) -> tuple[int, int] | None:
    """What a linear layer or 1x1 convolution maps from and to; None for anything else."""
    if isinstance(module, nn.Conv2d):
        pointwise = (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1) and not any(
            module.padding
        )
        return (module.in_channels, module.out_channels) if pointwise else None
    if isinstance(module, Conv1D) or hasattr(module, "in_features"):  # quantised layers have it too
        in_features, out_features = _get_in_out_features(module)
        return in_features, out_features
    return None


def _base(source: LoraSource) -> str:
    return source.base or "a base that it does not name"


def _called(model: nn.Module) -> str:
    name = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__} ({name})" if name else type(model).__name__
