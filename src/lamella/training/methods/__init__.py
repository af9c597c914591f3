"""The ways to fine-tune: each is a block of settings that builds the trainable model from a backbone.

One file a method; importing this package registers them all. Those over trained LoRAs are `Composition`s.
"""

from lamella.training.methods.arrow import Arrow
from lamella.training.methods.bare import Bare
from lamella.training.methods.base import Built, Method, method, method_from, trainable_parameters
from lamella.training.methods.best import Best
from lamella.training.methods.compositions import Composition
from lamella.training.methods.full import Full
from lamella.training.methods.head import Head
from lamella.training.methods.hidden_routing import HiddenRouting
from lamella.training.methods.lora import Lora, LoraOnly
from lamella.training.methods.lorahub import LoraHub
from lamella.training.methods.mola import Mola
from lamella.training.methods.mole import Mole
from lamella.training.methods.molex import Molex
from lamella.training.methods.peft_merge import PeftMerge
from lamella.training.methods.pem import Pem
from lamella.training.methods.prompt_tuning import PromptTuning
from lamella.training.methods.single import Single
from lamella.training.methods.weighted import Sum, Uniform
from lamella.training.methods.xlora import XLora

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
    "trainable_parameters",
]
