"""From the module names a LoRA was trained under to those of the model at hand."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    check_target_module_exists,
)
from peft.utils.other import _get_module_names_tied_with_embedding
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lamella.adapters.modules import adds_bias, fan
from lamella.adapters.peft_folder import saved_whole
from lamella.adapters.source import EmbeddingFactors, Factors, LoraSource, Tokens
from lamella.errors import LamellaError

Modules = Mapping[str, nn.Module]
_TRANSLATED = (
    "If its names are another program's, give its path to compose_pipeline, where the pipeline's class translates them."
)
LEFT_OUT = "left out by the config"
_OF_EXPERT = re.compile(r"\bexperts\.\d+\.")


@dataclass(frozen=True)
class Mapped:
    """A LoRA on a model.

    Attributes:
        modules: factors by the model's module names: linear modules, convolutions and embeddings.
        constants: what the LoRA adds to a module's output whatever its input, ``(out,)``: a bias of B, and the
            difference of a trained bias from the model's own.
        whole: modules that were trained whole and are not the model's own: their tensors, by module.
        skipped: what of the LoRA is not on this model, and why.
        renamed: how its module names were changed to be found; empty where they are the model's own.
    """

    modules: dict[str, Factors]
    constants: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    renamed: str = ""


def map_to(
    model: nn.Module,
    source: LoraSource,
    component: str | None = None,
    leave_out: Callable[[str], bool] = lambda _: False,
) -> Mapped:
    """Finds the module of each of a LoRA's factors and checks that they fit.

    Names are the model's own, or those that transformers or PEFT gave them in earlier versions, or all of them with
    another first part.

    Args:
        model: the base model.
        source: the LoRA.
        component: which of the LoRA's components is for this model; None where only one fits.
        leave_out: names of modules that are not asked for, whether the model has them or not.

    Raises:
        LamellaError: modules that the model does not have or that cannot be composed, other widths, or no component or
            several for this model.
    """
    modules = {name: BaseTunerLayer.get_base_layer(module) for name, module in model.named_modules()}
    component = component or _component_for(model, source, modules)
    if component not in source.components:
        raise LamellaError(f"{source.described} has nothing for {component}: it holds {', '.join(source.components)}.")
    factors = source.components[component]
    names, renamed = _names(model, [*factors, *source.tokens], modules)
    mapped: dict[str, Factors] = {}
    unmapped, unfit, odd, skipped = [], [], [], list(source.skipped)
    for name, lora in factors.items():
        ours = names[name]
        if leave_out(ours) or leave_out(name):
            skipped.append((ours, LEFT_OUT))
        elif ours not in modules:
            unmapped.append(name)
        elif not _can_have(modules[ours], lora):
            what = "an embedding" if isinstance(lora, EmbeddingFactors) else "a linear layer"
            odd.append(f"{ours} is a {type(modules[ours]).__name__}, not {what} that can be composed")
        elif misfit := _misfit(ours, modules[ours], lora):
            unfit.append(misfit)
        else:
            mapped[ours] = lora
    if unmapped:
        raise LamellaError(_says_unmapped(model, source, unmapped, len(factors)))
    if odd:
        raise LamellaError(
            f"{source.described} adapts what no composition has a form for: {odd[0]}{_more(odd)}. Leave it out, with "
            "exclude_modules in the config, or compose LoRAs without it."
        )
    if unfit:
        raise LamellaError(
            f"{source.described} was trained on {_base(source)} and does not fit "
            f"{_called(model)}: {unfit[0]}{_more(unfit)}. Compose only LoRAs "
            "of one base, on that base."
        )
    for name, tokens in source.tokens.items():
        for ours, lora in _of_tokens(model, names[name], tokens, modules, source).items():
            if ours in mapped:
                raise LamellaError(
                    f"{source.described} has trained tokens of {ours} and a LoRA of it too, of which PEFT uses one. "
                    "Leave it out with exclude_modules."
                )
            mapped[ours] = lora
    skipped += [(name, "for another component of the pipeline") for name in source.components if name != component]
    constants, whole = _beside_factors(model, source, modules)
    for name, constant in source.constants.get(component, {}).items():
        if (ours := names[name]) in mapped:
            constants[ours] = constants[ours] + constant if ours in constants else constant
    if not renamed:
        _warn_of_missing(source, [name for name in _missing(source.config, mapped, modules) if not leave_out(name)])
        _warn_of_more(source, [names[name] for name in factors if not _is_asked_for(source.config, names[name])])
    return Mapped(mapped, constants, whole, skipped, renamed)


def _can_have(module: nn.Module, lora: Factors) -> bool:
    return fan(module) is not None and isinstance(lora, EmbeddingFactors) == isinstance(module, nn.Embedding)


def _misfit(name: str, module: nn.Module, lora: Factors) -> str | None:
    """Why a LoRA of the right kind is not one of this module; None where it is."""
    sides, width, kernel = fan(module), lora.A.flatten(1).shape[1], tuple(lora.A.shape[2:])
    assert sides is not None
    if sides == (width, lora.B.shape[0]) and kernel in ((), tuple(getattr(module, "kernel_size", ()))):
        return None
    return f"{name} maps {sides[0]} features to {sides[1]}, the LoRA's {width} to {lora.B.shape[0]}"


def _says_unmapped(model: nn.Module, source: LoraSource, unmapped: list[str], count: int) -> str:
    fused = [name for name in unmapped if _OF_EXPERT.search(name)]
    if fused and any(parameter.dim() == 3 for parameter in model.parameters()):
        return (
            f"{source.described} adapts single experts ({fused[0]}, and {len(fused) - 1} more), which "
            f"{_called(model)} keeps as one parameter for all of them. PEFT loads such a LoRA; a composition mixes the "
            f"outputs of modules, and these have none. Leave them out, as in MoleConfig(exclude_modules=r'.*experts.*')"
            ", or compose LoRAs of the attention."
        )
    return (
        f"{source.described} adapts {len(unmapped)} of {count} modules that {_called(model)} does not have, first "
        f"{', '.join(unmapped[:3])}. It was trained on {_base(source)}; compose it on that one."
        + ("" if source.format == "PEFT" else f" {_TRANSLATED}")
    )


def _of_tokens(model: nn.Module, name: str, tokens: Tokens, modules: Modules, source: LoraSource) -> dict[str, Factors]:
    """Trained tokens as a LoRA of the embedding, whose A chooses them and whose B has what was learned.

    What is tied to it has them too, as in PEFT.
    """
    module = modules.get(name)
    if not isinstance(module, nn.Embedding):
        raise LamellaError(f"{source.described} has trained tokens of {name}, which is no embedding of the model.")
    vocabulary, features = module.weight.shape
    if max(tokens.indices) >= vocabulary or tokens.values.shape != (len(tokens.indices), features):
        raise LamellaError(
            f"{source.described} has {tuple(tokens.values.shape)} values for {len(tokens.indices)} trained tokens up "
            f"to {max(tokens.indices)}, and {name} has {vocabulary} tokens of {features} features. Resize the model's "
            "embeddings as they were for training."
        )
    choose = torch.zeros(len(tokens.indices), vocabulary)  # (N, vocabulary)
    choose[torch.arange(len(tokens.indices)), tokens.indices] = 1
    own = _values(module.weight)[tokens.indices]  # (N, features)
    learned = tokens.values.float() - own.float()
    found: dict[str, Factors] = {name: EmbeddingFactors(choose, learned.t(), 1.0)}
    for other in _tied_to(model, module):
        if other not in source.tokens:
            is_head = not isinstance(modules[other], nn.Embedding)
            found[other] = Factors(learned, choose.t(), 1.0) if is_head else EmbeddingFactors(choose, learned.t(), 1.0)
    return found


def _tied_to(model: nn.Module, embedding: nn.Module) -> list[str]:
    """The modules whose weight is the embedding's own, as PEFT finds them, by the names that they have without it."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return []
    assert isinstance(model, PreTrainedModel)
    if BaseTunerLayer.get_base_layer(model.get_input_embeddings()) is not embedding:
        return []
    return [name.removesuffix(".base_layer") for name in _get_module_names_tied_with_embedding(model)]


def _beside_factors(
    model: nn.Module, source: LoraSource, modules: Modules
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Trained biases as differences from the model's own; and what modules trained whole are not the model's own."""
    constants: dict[str, Tensor] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    own_already: dict[str, bool] = {}
    names, _ = _names(model, list(dict.fromkeys(key.rpartition(".")[0] for key in source.whole)), modules)
    for key, tensor in source.whole.items():
        place, _, parameter = key.rpartition(".")
        module, head = modules.get(names[place]), saved_whole(names[place], source.config)
        own: Any = getattr(module, parameter, None)
        fits = isinstance(own, Tensor) and own.shape == tensor.shape
        if fits and head is None and parameter == "bias" and own.dim() == 1 and adds_bias(module):
            constants[names[place]] = tensor.float() - _values(own).float()
            continue
        head = head or names[place]
        inside = f"{names[place]}.{parameter}".removeprefix(f"{head}.")
        whole.setdefault(head, {})[inside] = tensor
        same = fits and (own.is_meta or torch.equal(_values(own), tensor.to(own.dtype)))
        own_already[head] = own_already.get(head, True) and same
    return constants, {head: tensors for head, tensors in whole.items() if not own_already[head]}


def _values(tensor: Tensor) -> Tensor:
    """A tensor's numbers; zeros for one on the meta device, which has a shape alone."""
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach().cpu()


def _missing(config: LoraConfig | None, mapped: Mapping[str, Factors], modules: Modules) -> list[str]:
    """What the config adapts and the file lacks."""
    if config is None or not _says_what(config):
        return []
    adapters = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    return [
        name
        for name, module in modules.items()
        if name not in mapped
        and fan(module) is not None
        and not name.startswith(adapters)
        and _is_asked_for(config, name)
    ]


def _says_what(config: LoraConfig) -> bool:
    return bool(config.target_modules) and config.target_modules != "all-linear"


def _is_asked_for(config: LoraConfig | None, name: str) -> bool:
    """Whether a config adapts a module, or does not say; what is tied to such a module counts with it."""
    if config is None or config.ensure_weight_tying or not _says_what(config):
        return True
    match = check_target_module_exists(config, name)
    return bool(match) and not isinstance(match, _ExcludedModule)


def _warn_of_missing(source: LoraSource, missing: list[str]) -> None:
    if missing:
        warnings.warn(
            f"{source.described} has nothing for {len(missing)} modules that its config says it adapts, first "
            f"{', '.join(missing[:3])}: the file is incomplete, or was meant so. There it adds nothing.",
            stacklevel=3,
        )


def _warn_of_more(source: LoraSource, more: list[str]) -> None:
    if more:
        warnings.warn(
            f"{source.described} has LoRAs of {len(more)} modules that its config does not adapt, first "
            f"{', '.join(more[:3])}. They are composed as all others are, where PEFT leaves them out: exclude_modules "
            "does that here, or the config is not the one that was saved with the file.",
            stacklevel=3,
        )


def _component_for(model: nn.Module, source: LoraSource, modules: Modules) -> str:
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


def _fits(model: nn.Module, factors: Mapping[str, Factors], modules: Modules) -> bool:
    names, _ = _names(model, list(factors), modules)
    return all(
        (ours := names[name]) in modules
        and _can_have(modules[ours], lora)
        and _misfit(ours, modules[ours], lora) is None
        for name, lora in factors.items()
    )


def _names(model: nn.Module, names: list[str], modules: Modules) -> tuple[dict[str, str], str]:
    """The model's name for each of a LoRA's, where it has one, and how that differs: the change that finds most."""
    best: tuple[int, dict[str, str], str] = (-1, {}, "")
    for renamed, said in _renamings(model, names):
        found = sum(name in modules for name in renamed.values())
        if found > best[0]:
            best = found, renamed, said
        if found == len(names):
            break
    return best[1], best[2]


def _renamings(model: nn.Module, names: list[str]) -> Iterator[tuple[dict[str, str], str]]:
    """Changes of the names of a LoRA's modules, the likelier first."""
    yield {name: name for name in names}, ""
    if not names:
        return
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if prefix != ".":
        yield {name: prefix + name for name in names}, f"{prefix} put before each name"
    first = f"{names[0].partition('.')[0]}."
    if all(name.startswith(first) for name in names):
        yield {name: name.removeprefix(first) for name in names}, f"{first} taken off each name"
        if prefix != ".":
            yield (
                {name: prefix + name.removeprefix(first) for name in names},
                f"{first} replaced by {prefix} in each name",
            )
    yield _of_this_version(model, names), "names of an earlier version of transformers"


def _of_this_version(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Names that transformers gave modules in earlier versions as it gives them now, by its own table."""
    same = {name: name for name in names}
    if not isinstance(model, PreTrainedModel):
        return same
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    weights, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, str] = {}
    for name in same:
        key, _ = rename_source_key(f"{name}.weight", renamings, [], prefix, weights)
        found[name] = key.removesuffix(".weight")
    return found


def _more(said: list[str]) -> str:
    return f", and {len(said) - 1} more" if said[1:] else ""


def _base(source: LoraSource) -> str:
    return source.base or "a base that it does not name"


def _called(model: nn.Module) -> str:
    name = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__} ({name})" if name else type(model).__name__
