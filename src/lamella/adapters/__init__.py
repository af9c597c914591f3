"""Trained LoRAs as they lie about: PEFT folders, kohya's and diffusers' files, hub ids; read, checked and mapped."""

from lamella.adapters.mapping import PUBLISHED_NAMES, Mapped, check_base, map_to, published_name
from lamella.adapters.read import read_lora
from lamella.adapters.source import Factors, LoraSource, Reference, by_name

__all__ = [
    "PUBLISHED_NAMES",
    "Factors",
    "LoraSource",
    "Mapped",
    "Reference",
    "by_name",
    "check_base",
    "map_to",
    "published_name",
    "read_lora",
]
