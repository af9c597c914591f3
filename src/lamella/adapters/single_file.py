"""A LoRA in one .safetensors file: kohya's (also called civitai's) naming, or diffusers'."""

import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig
from torch import Tensor

from lamella.adapters.pairs import pair, refuse_other_methods
from lamella.adapters.peft_folder import refuse_variants, scaling_by
from lamella.adapters.source import MODEL, Factors, Parsed
from lamella.errors import LamellaError

_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer")
_PEFT_PREFIX = "base_model.model."
# kohya numbers the blocks of SDXL as the original UNet does; every published Stable Diffusion UNet has two layers in a
# block, and a wrong guess would name blocks that the model does not have.
_LAYERS_PER_BLOCK = 2
_DIFFUSERS_METADATA = "lora_adapter_metadata"
# Where kohya's and civitai's trainers say which base they trained on.
_BASE_KEYS = ("ss_base_model_version", "ss_sd_model_name", "modelspec.architecture")


def read_single(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], who: str) -> Parsed:
    """Reads a single file's tensors.

    Args:
        tensors: under the file's own names.
        metadata: the file's header.
        who: the LoRA, for errors.

    Raises:
        LamellaError: another method, an unknown format, tensors that nobody knows, or diffusers is needed and absent.
    """
    refuse_other_methods(tensors, who)
    if any(name.startswith(_KOHYA) for name in tensors):
        return _read_kohya(tensors, metadata, who)
    if any(name.startswith(_PEFT_PREFIX) for name in tensors):
        raise LamellaError(
            f"{who} has PEFT's names, but no adapter_config.json beside it, so its scaling is unknown. Give the folder "
            "with both."
        )
    if not any("lora" in name for name in tensors):
        raise LamellaError(
            f"{who} holds no tensor with 'lora' in its name{f', first {next(iter(tensors))}' if tensors else ''}: it "
            "is empty or not a LoRA."
        )
    return _read_diffusers(tensors, metadata, who)


def _read_kohya(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], who: str) -> Parsed:
    """Kohya joins module names with underscores and gives each module an alpha; diffusers knows the names."""
    foreign = [name for name in tensors if not name.startswith(_KOHYA)]
    if foreign:
        raise LamellaError(f"{who} has kohya's names, but also {len(foreign)} others, first {foreign[0]}. {_CONVERT}")
    alphas = {name.removesuffix(".alpha"): float(t) for name, t in tensors.items() if name.endswith(".alpha")}
    down = {
        name.removesuffix(".lora_down.weight"): t for name, t in tensors.items() if name.endswith("lora_down.weight")
    }
    lonely = sorted(set(alphas) - set(down))
    if lonely:
        raise LamellaError(f"{who} has an alpha without a LoRA for {lonely[0]}. The file is incomplete; save it again.")
    # The converter hands every tensor through as it is, so each is known again under its new name.
    alpha_of = {id(tensor): alphas.get(name, float(len(tensor))) for name, tensor in down.items()}
    components, skipped = {}, []
    for component, part in _by_component(_from_kohya(tensors, who), who).items():
        converted = _to_peft(component, part, who)
        alpha_by_module = {
            name.removesuffix(".lora_A.weight"): alpha_of[id(tensor)]
            for name, tensor in converted.items()
            if name.endswith(".lora_A.weight")
        }
        modules, left = pair(converted, _over_rank(alpha_by_module), _no_reason, who)
        components[component] = modules
        skipped += [(f"{component}.{name}", reason) for name, reason in left]
    base = next((metadata[key] for key in _BASE_KEYS if metadata.get(key)), None)
    return Parsed("kohya", base, _without_empty(components), skipped)


def _read_diffusers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], who: str) -> Parsed:
    """diffusers writes each component's LoRA under its name and, in newer files, its LoraConfig into the header."""
    configs = _saved_configs(metadata, who)
    components, skipped = {}, []
    for component, part in _by_component(tensors, who).items():
        config = configs.get(component)
        if config is not None:
            refuse_variants(config, who)
        scaling = scaling_by(config, who) if config is not None else _one
        modules, left = pair(_to_peft(component, part, who), scaling, _bias_of_b, who)
        components[component] = modules
        skipped += [(f"{component}.{name}", reason) for name, reason in left]
    return Parsed("diffusers", None, _without_empty(components), skipped)


def _from_kohya(tensors: Mapping[str, Tensor], who: str) -> dict[str, Tensor]:
    _require_diffusers(who)
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    try:
        converted, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(
            dict(tensors), unet_config=SimpleNamespace(layers_per_block=_LAYERS_PER_BLOCK)
        )
    except (ValueError, KeyError, IndexError) as error:
        raise LamellaError(
            f"{who} has kohya's names, but diffusers cannot read it: {' '.join(str(error).split())}. {_CONVERT}"
        ) from error
    return converted


def _to_peft(component: str, tensors: Mapping[str, Tensor], who: str) -> dict[str, Tensor]:
    """diffusers' older names as PEFT's; what has PEFT's names already is left as it is."""
    if all(".lora_A." in name or ".lora_B." in name for name in tensors):
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


def _require_diffusers(who: str) -> None:
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise LamellaError(
            f"{who} has names that only diffusers can translate: run `pip install 'lamella[diffusion]'`."
        ) from error


def _without_empty(components: dict[str, dict[str, Factors]]) -> dict[str, dict[str, Factors]]:
    return {component: modules for component, modules in components.items() if modules}


def _over_rank(alphas: Mapping[str, float]) -> Callable[[str, int], float]:
    return lambda module, r: alphas[module] / r


def _one(_: str, __: int) -> float:
    """diffusers' convention for a file that states no alpha: alpha is the rank."""
    return 1.0


def _no_reason(_: str) -> None:
    return None


def _bias_of_b(key: str) -> str | None:
    return "a bias of B (lora_bias=True); only the weights are composed" if key.endswith(".lora_B.bias") else None


_CONVERT = "Load it with the pipeline it was made for and save it again with diffusers' save_lora_weights."
