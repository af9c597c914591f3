"""The ways to fine-tune: each is a block of settings that builds the trainable model from a backbone.

One file a method; importing this package registers them all. Those over trained LoRAs are `Composition`s.
"""

from lamella.lab.methods.arrow import Arrow
from lamella.lab.methods.bare import Bare
from lamella.lab.methods.base import Built, Method, method, method_from, read_saved, trainable_parameters
from lamella.lab.methods.best import Best
from lamella.lab.methods.compositions import Composition
from lamella.lab.methods.full import Full
from lamella.lab.methods.head import Head
from lamella.lab.methods.hidden_routing import HiddenRouting
from lamella.lab.methods.lora import Lora, LoraOnly
from lamella.lab.methods.lorahub import LoraHub
from lamella.lab.methods.mola import Mola
from lamella.lab.methods.mole import Mole
from lamella.lab.methods.molex import Molex
from lamella.lab.methods.peft_merge import PeftMerge
from lamella.lab.methods.pem import Pem
from lamella.lab.methods.prompt_tuning import PromptTuning
from lamella.lab.methods.single import Single
from lamella.lab.methods.weighted import Sum, Uniform
from lamella.lab.methods.xlora import XLora

__all__ = [
    "Arrow",
    "Bare",
    "Best",
    "Built",
    "Composition",
    "Full",
    "Head",
    "HiddenRouting",
    "Lora",
    "LoraHub",
    "LoraOnly",
    "Method",
    "Mola",
    "Mole",
    "Molex",
    "PeftMerge",
    "Pem",
    "PromptTuning",
    "Single",
    "Sum",
    "Uniform",
    "XLora",
    "method",
    "method_from",
    "read_saved",
    "trainable_parameters",
]
