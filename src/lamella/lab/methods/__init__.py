"""The ways to fine-tune: each is a block of settings that builds the trainable model from a backbone.

Importing this package registers them all. Those over trained LoRAs are `ComposingMethod`s.
"""

from lamella.lab.methods import controls, learned, merging, routed, searched, subspaces, sums
from lamella.lab.methods.base import Built, Configured, Method, method, method_from, read_saved, trainable_parameters
from lamella.lab.methods.compositions import ComposingMethod, composition
from lamella.lab.methods.finetuning import Lora, LoraOnly, Mola, Molex
from lamella.lab.methods.routed import Mole

__all__ = [
    "Built",
    "ComposingMethod",
    "Configured",
    "Lora",
    "LoraOnly",
    "Method",
    "Mola",
    "Mole",
    "Molex",
    "composition",
    "controls",
    "learned",
    "merging",
    "method",
    "method_from",
    "read_saved",
    "routed",
    "searched",
    "subspaces",
    "sums",
    "trainable_parameters",
]
