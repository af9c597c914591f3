"""Composing trained LoRAs on a model in one call."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lamella.adapters import AdapterLibrary, LoraSource, Reference, by_name, fit, read_lora
from lamella.adapters.fitting import outlines
from lamella.errors import LamellaError
from lamella.tuners.mole.config import MoleConfig
from lamella.tuners.mole.plan import refuse_too_few

Lora = str | Path | Reference | LoraSource


def compose(
    base: nn.Module,
    adapters: Mapping[str, Lora] | Sequence[Lora] | AdapterLibrary,
    config: MoleConfig | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Puts trained LoRAs on a model and routers beside them that weight the LoRAs by their outputs (MOLE).

    All LoRAs start with the same weight; only the routers train and are saved.

    Args:
        base: the model that the LoRAs were trained on.
        adapters: at least two LoRAs by name: PEFT folders, single files, hub ids, or LoRAs that were read already. In a
            list each is called by its folder or file. Of a library those LoRAs that are for the model, which is said.
        config: the settings, without adapters; MoleConfig's own where None.
        adapter_name: of the composition.

    Raises:
        LamellaError: fewer than two LoRAs, two of one name, one that cannot be read or is of another base, or settings
            that do not suit the model. The model is then as it was.
    """
    refuse_other_bases(base)
    refuse_other_configs(config)
    config = MoleConfig() if config is None else copy.deepcopy(config)
    if config.adapters:
        raise LamellaError(
            f"The config names LoRAs already ({', '.join(config.adapters)}); leave its adapters empty and give them to "
            "compose, or call get_peft_model(model, config)."
        )
    sources: Sequence[LoraSource]
    if config.shortlist is not None:
        sources = outlines(
            fitting(base, adapters if isinstance(adapters, AdapterLibrary) else AdapterLibrary(adapters))
        )
    elif isinstance(adapters, AdapterLibrary):
        sources = [adapters.read(name) for name in fitting(base, adapters).names]
    else:
        sources = read_given(adapters)
    refuse_too_few([source.name for source in sources])
    config.adapters = {source.name: source for source in sources}
    model: Any = get_peft_model(base, config, adapter_name)
    assert isinstance(model, PeftModel)
    return model


def refuse_other_bases(base: Any) -> None:
    """Raises unless LoRAs can be composed on what was given."""
    if isinstance(base, PeftModel):
        raise LamellaError(
            f"The base is a {type(base).__name__} with the adapter {base.active_adapter!r} on it. Compose on the bare "
            "model, which its unload() gives back; or put the composition beside that adapter, with "
            "model.add_adapter(name, MoleConfig(adapters={...}))."
        )
    if not isinstance(base, nn.Module):
        is_pipeline = isinstance(getattr(base, "components", None), Mapping)
        way = "use lamella.compose_pipeline" if is_pipeline else "give a model, such as from_pretrained loads it"
        raise LamellaError(f"The base is a {type(base).__name__}, and LoRAs are composed on a model: {way}.")


def refuse_other_configs(config: Any) -> None:
    """Raises where the settings are not those of MOLE."""
    if config is not None and not isinstance(config, MoleConfig):
        raise LamellaError(f"The config is a {type(config).__name__}; give a MoleConfig, or none for its defaults.")


def fitting(base: nn.Module, library: AdapterLibrary) -> AdapterLibrary:
    """The LoRAs of a library that are for a model; says which are not.

    Raises:
        LamellaError: none is.
    """
    misfits = fit(base, library).misfits
    if len(misfits) == len(library):
        raise LamellaError(
            f"None of the library's {len(library)} LoRAs is for this model: {next(iter(misfits.values()))}"
        )
    if misfits:
        name, reason = next(iter(misfits.items()))
        warnings.warn(
            f"{len(misfits)} of the library's {len(library)} LoRAs are left out, first {name!r}: {reason} "
            "AdapterLibrary.only chooses others.",
            stacklevel=3,
        )
    return library.only([name for name in library.names if name not in misfits])


def read_given(adapters: Mapping[str, Lora] | Sequence[Lora], pipe: Any = None) -> list[LoraSource]:
    """Reads the LoRAs that a user gave, for a diffusers pipeline where there is one.

    Raises:
        LamellaError: two of one name, one that cannot be read, or something else than places of LoRAs.
    """
    if isinstance(adapters, str | Path | Reference | LoraSource) or not isinstance(adapters, Mapping | Sequence):
        raise LamellaError(
            f"adapters is a {type(adapters).__name__}; give the LoRAs by name, as in {{'a': path, 'b': path}}, or a "
            "list of their places."
        )
    if any(isinstance(given, Tensor) for given in (adapters.values() if isinstance(adapters, Mapping) else adapters)):
        raise LamellaError(
            "adapters is one LoRA's tensors by name; save them with safetensors.torch.save_file, and give the places "
            "of at least two LoRAs by name, as in {'a': path, 'b': path}."
        )
    named = adapters.items() if isinstance(adapters, Mapping) else ((None, given) for given in adapters)
    return list(by_name(_read(given, name, pipe) for name, given in named).values())


def _read(given: Lora, name: str | None, pipe: Any) -> LoraSource:
    if isinstance(given, LoraSource):
        return given if name is None else replace(given, name=name)
    return read_lora(given, name=name, pipe=pipe)
