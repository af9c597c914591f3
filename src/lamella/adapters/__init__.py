"""Trained LoRAs as they lie about: PEFT folders, kohya's and diffusers' files, hub ids; read, checked and mapped."""

from lamella.adapters.bases import BaseNames, located, published_name, register_base_names
from lamella.adapters.mapping import Mapped, check_base, map_to
from lamella.adapters.read import read_lora
from lamella.adapters.source import Factors, LoraSource, Reference, by_name

__all__ = [
    "BaseNames",
    "Factors",
    "LoraSource",
    "Mapped",
    "Reference",
    "by_name",
    "check_base",
    "located",
    "map_to",
    "published_name",
    "read_lora",
    "register_base_names",
]
