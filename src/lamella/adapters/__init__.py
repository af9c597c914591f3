"""Trained LoRAs as they lie about: PEFT folders, kohya's and diffusers' files, hub ids; read, checked and mapped."""

from lamella.adapters.bases import BaseNames, located, published_name, register_base_names
from lamella.adapters.fitting import fit
from lamella.adapters.identity import check_base, has_weights_of
from lamella.adapters.library import AdapterLibrary
from lamella.adapters.mapping import Mapped, map_to
from lamella.adapters.modules import adds_bias, fan, projects, sides_of
from lamella.adapters.read import read_lora
from lamella.adapters.source import Factors, LoraSource, Reference, by_name

__all__ = [
    "AdapterLibrary",
    "BaseNames",
    "Factors",
    "LoraSource",
    "Mapped",
    "Reference",
    "adds_bias",
    "by_name",
    "check_base",
    "fan",
    "fit",
    "has_weights_of",
    "located",
    "map_to",
    "projects",
    "published_name",
    "read_lora",
    "register_base_names",
    "sides_of",
]
