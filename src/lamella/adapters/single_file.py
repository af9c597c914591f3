"""A LoRA in one .safetensors file: diffusers' naming, or another program's, which diffusers translates."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lamella.adapters.pairs import is_part, pair, refuse_other_methods, refuse_unknown
from lamella.adapters.peft_folder import plain_names, refuse_variants, scaling_by
from lamella.adapters.source import MODEL, Factors, Parsed
from lamella.errors import LamellaError

_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_")
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer")
_DOWN = re.compile(r"(.+)\.lora(?:[_.]down|_A)(?:\..+)?")
_PEFT_PREFIX = "base_model.model."
# kohya numbers the blocks of SDXL as the original UNet does; every published Stable Diffusion UNet has two layers in a
# block, and a wrong guess would name blocks that the model does not have.
_LAYERS_PER_BLOCK = 2
_DIFFUSERS_METADATA = "lora_adapter_metadata"
# Where kohya's and civitai's trainers say which base they trained on.
_BASE_KEYS = ("ss_base_model_version", "ss_sd_model_name", "modelspec.architecture")


_WHAT_CONVERTERS_RAISE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, NameError, AssertionError)


def read_single(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], who: str, pipe: Any = None) -> Parsed:
    """Reads a single file's tensors.

    Args:
        tensors: under the file's own names.
        metadata: the file's header.
        who: the LoRA, for errors.
        pipe: the pipeline that it is for; None reads what needs none.

    Raises:
        LamellaError: another method, an unknown format, tensors that nobody knows, or diffusers is needed and absent.
    """
    refuse_other_methods(tensors, who)
    if not any("lora" in name for name in tensors):
        raise LamellaError(
            f"{who} holds no tensor with 'lora' in its name{f', first {next(iter(tensors))}' if tensors else ''}: it "
            "is empty or not a LoRA."
        )
    translator = _translator(pipe, tensors)
    if translator is not None:
        return _translated(tensors, metadata, who, translator, pipe)
    if hasattr(pipe, "lora_state_dict"):
        _refuse_dropped_alphas(tensors, who, type(pipe), pipe)
    if any(name.startswith(_KOHYA) for name in tensors):
        foreign = [name for name in tensors if not name.startswith(_KOHYA)]
        if foreign:
            raise LamellaError(
                f"{who} has kohya's names, but also {len(foreign)} others, first {foreign[0]}. {_CONVERT}"
            )
        return _translated(tensors, metadata, who, _stable_diffusion(who), pipe)
    _refuse_untranslated(tensors, who)
    components, constants = _components(tensors, metadata, who, {})
    return Parsed("diffusers", None, components, [], constants)


def _translator(pipe: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The pipeline's class, if it knows how other programs call its modules and the file has not its own names."""
    if pipe is None or not hasattr(pipe, "lora_state_dict") or _names_its_modules(pipe, tensors):
        return None
    return type(pipe)


def _names_its_modules(pipe: Any, tensors: Iterable[str]) -> bool:
    """Whether a file has PEFT's names of the modules of a pipeline's models already."""
    models = {name: model for name, model in pipe.components.items() if isinstance(model, nn.Module)}
    modules = {name: {module for module, _ in model.named_modules()} for name, model in models.items()}
    bare = set().union(*(modules[name] for name in ("unet", "transformer") if name in modules))
    for tensor in tensors:
        if (module := is_part(tensor)) is None:
            return False
        component, _, inner = module.partition(".")
        if inner not in modules.get(component, ()) and module not in bare:
            return False
    return True


def _stable_diffusion(who: str) -> Any:
    _require_diffusers(who)
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    return StableDiffusionLoraLoaderMixin


def _translated(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], who: str, translator: Any, pipe: Any
) -> Parsed:
    """The file as a pipeline's class reads it; what it leaves out is named."""
    _refuse_lonely_alphas(tensors, who)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            # Copies with a gradient: what is in no translated tensor's history was left out.
            given = {name: t.float() if name.endswith("alpha") else _traced(t) for name, t in tensors.items()}
            translated, alphas = _by_diffusers(given, translator, pipe)
    except _WHAT_CONVERTERS_RAISE as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise LamellaError(
            f"{who} has names such as {next(iter(tensors))}, and diffusers cannot read it for {translator.__name__}: "
            f"{said}. {_CONVERT}"
        ) from error
    _refuse_untranslated(translated, who, translator.__name__)
    _refuse_dropped_alphas(tensors, who, translator, pipe)
    left_out = [
        (name, "diffusers has no place for it")
        for name in _unused(given, translated.values())
        if not name.endswith("alpha") and tensors[name].any()
    ]
    # Alphas that come back were not multiplied in; what they belong to was handed through as it is.
    pending = _alphas_by_tensor(given) if alphas else {}
    base = next((metadata[key] for key in _BASE_KEYS if metadata.get(key)), None)
    is_kohya = any(name.startswith(_KOHYA) for name in tensors)
    components, constants = _components(translated, metadata, who, pending)
    return Parsed("kohya" if is_kohya else "diffusers", base, components, left_out, constants)


def _by_diffusers(
    tensors: Mapping[str, Tensor], translator: Any, pipe: Any
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A file's tensors by diffusers' names, and the alphas that were not multiplied in."""
    unet = getattr(getattr(pipe, "unet", None), "config", SimpleNamespace(layers_per_block=_LAYERS_PER_BLOCK))
    told: dict[str, Any] = {"unet_config": unet}
    if "return_alphas" in signature(translator.lora_state_dict).parameters:
        told["return_alphas"] = True
    answer = translator.lora_state_dict(dict(tensors), **told)
    return answer if isinstance(answer, tuple) else (answer, None)


def _refuse_dropped_alphas(tensors: Mapping[str, Tensor], who: str, translator: Any, pipe: Any) -> None:
    """Refuses a file that diffusers loads without its alphas.

    Whether an alpha counts is seen from what becomes of the file with twice as large ones; as the rank it changes
    nothing.
    """
    alphas = [name for name in tensors if name.endswith(".alpha")]
    ranks = {match[1]: float(len(t)) for name, t in tensors.items() if (match := _DOWN.fullmatch(name))}
    if all(tensors[name].flatten().tolist() == [ranks.get(name.removesuffix(".alpha"))] for name in alphas):
        return
    answers = []
    for factor in (1.0, 2.0):
        given = {name: factor * t.float() if name in alphas else t.clone() for name, t in tensors.items()}
        try:
            translated, left = _by_diffusers(given, translator, pipe)
        except _WHAT_CONVERTERS_RAISE:
            return  # it would not load the file at all
        answers.append({name: tensor for name, tensor in translated.items() if name not in alphas} | (left or {}))
    once, twice = answers
    if all(torch.equal(torch.as_tensor(once[name]), torch.as_tensor(twice[name])) for name in once):
        raise LamellaError(
            f"{who} has alphas, such as {alphas[0]}, which {translator.__name__}.load_lora_weights leaves out, so that "
            "it is another LoRA there than it was trained as. Multiply each up factor by alpha / rank, and save the "
            "file without alphas."
        )


def _traced(tensor: Tensor) -> Tensor:
    plain = tensor.clone() if tensor.is_inference() else tensor.detach()
    return plain.requires_grad_().clone()


def _unused(given: Mapping[str, Tensor], results: Iterable[Tensor]) -> list[str]:
    """The names of tensors that no result was made from."""
    reached, waiting = set(), [result.grad_fn for result in results]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in reached:
            reached.add(node)
            waiting += [function for function, _ in node.next_functions]
    return [name for name, tensor in given.items() if tensor.grad_fn not in reached]


def _alphas_by_tensor(given: Mapping[str, Tensor]) -> dict[int, float]:
    """By the identity of a module's A, its alpha; without one, kohya's programs take the rank."""
    alphas: dict[int, float] = {}
    for name, tensor in given.items():
        module = name.removesuffix(".lora_down.weight")
        if module != name:
            alpha = given.get(f"{module}.alpha")
            alphas[id(tensor)] = float(len(tensor)) if alpha is None else float(alpha)
    return alphas


def _components(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], who: str, alphas: Mapping[int, float]
) -> tuple[dict[str, dict[str, Factors]], dict[str, dict[str, Tensor]]]:
    """Factors, and constants, by component and module.

    A module's scaling is by its alpha, by the header's config, or 1, in this order.
    """
    configs = _saved_configs(metadata, who)
    components, constants = {}, {}
    for component, part in _by_component(tensors, who).items():
        config = configs.get(component)
        if config is not None:
            refuse_variants(config, who)
        named = _to_peft(component, plain_names(part, who), who)
        scaling = scaling_by(config, who) if config is not None else _one
        if alphas:
            scaling = _over_rank({name.removesuffix(".lora_A.weight"): alphas.get(id(t)) for name, t in named.items()})
        pairs = pair({name: tensor.detach() for name, tensor in named.items()}, scaling, who)
        refuse_unknown([f"{component}.{name}" for name in pairs.rest], who)
        if pairs.modules:
            components[component], constants[component] = pairs.modules, pairs.constants
    return components, constants


def _to_peft(component: str, tensors: Mapping[str, Tensor], who: str) -> dict[str, Tensor]:
    """diffusers' older names as PEFT's; what has PEFT's names already is left as it is."""
    if all(is_part(name) is not None for name in tensors):
        return dict(tensors)
    _require_diffusers(who)
    from diffusers.utils import state_dict_utils as names

    if component.startswith("text_encoder"):
        # Both namings may be in one file, and diffusers tells them apart by layers that a file need not have.
        renamed = names.convert_state_dict_to_peft(dict(tensors), original_type=names.StateDictType.DIFFUSERS_OLD)
        return names.convert_state_dict_to_peft(renamed, original_type=names.StateDictType.DIFFUSERS)
    return names.convert_unet_state_dict_to_peft(dict(tensors))


def _by_component(tensors: Mapping[str, Tensor], who: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by component, without its prefix; a file without any prefix is for whichever model it is mapped on."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        component, inner = (first, rest) if first in _COMPONENTS else (MODEL, name)
        parts.setdefault(component, {})[inner] = tensor
    if len(parts) > 1 and MODEL in parts:
        raise LamellaError(
            f"{who} holds tensors of {', '.join(sorted(set(parts) - {MODEL}))} and {len(parts[MODEL])} of no component "
            f"known here, first {next(iter(parts[MODEL]))}. {_CONVERT}"
        )
    return parts


def _saved_configs(metadata: Mapping[str, str], who: str) -> dict[str, LoraConfig]:
    """Each component's LoraConfig from the header; under MODEL where the header has it without a component."""
    written = metadata.get(_DIFFUSERS_METADATA)
    if not written:
        return {}
    by_component: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(written).items():
            first, _, rest = key.partition(".")
            component, field = (first, rest) if first in _COMPONENTS else (MODEL, key)
            by_component.setdefault(component, {})[field] = value
        return {component: LoraConfig.from_peft_type(**fields) for component, fields in by_component.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LamellaError(
            f"{who} has a header {_DIFFUSERS_METADATA} that PEFT cannot read: {error}. {_CONVERT}"
        ) from error


def _refuse_untranslated(names: Iterable[str], who: str, by: str = "any model") -> None:
    """Refuses names that only a translation could make those of modules."""
    for name in names:
        if name.startswith(_PEFT_PREFIX):
            raise LamellaError(
                f"{who} has PEFT's names, but no adapter_config.json beside it, so its scaling is unknown. Give the "
                "folder with both."
            )
        if name.startswith(_KOHYA):
            raise LamellaError(
                f"{who} has kohya's names, such as {name}, which diffusers does not translate for {by}. Convert it to "
                "diffusers' names with the program that wrote it."
            )


def _refuse_lonely_alphas(tensors: Mapping[str, Tensor], who: str) -> None:
    modules = {match[1] for name in tensors if (match := _DOWN.fullmatch(name))}
    for name in tensors:
        if name.endswith(".alpha") and name.removesuffix(".alpha") not in modules:
            raise LamellaError(
                f"{who} has an alpha without a LoRA for {name.removesuffix('.alpha')}. The file is incomplete; save it "
                "again."
            )


def _require_diffusers(who: str) -> None:
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise LamellaError(
            f"{who} has names that only diffusers can translate: run `pip install 'lamella[diffusion]'`."
        ) from error


def _over_rank(alphas: Mapping[str, float | None]) -> Callable[[str, int], float]:
    def scaling(module: str, r: int) -> float:
        alpha = alphas[module]
        return 1.0 if alpha is None else alpha / r

    return scaling


def _one(_: str, __: int) -> float:
    """diffusers' convention for a file that states no alpha: alpha is the rank."""
    return 1.0


_CONVERT = "Load it with the pipeline it was made for and save it again with diffusers' save_lora_weights."
