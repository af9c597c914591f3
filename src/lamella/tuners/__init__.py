"""The PEFT methods. Importing this package registers them with PEFT."""

from lamella.tuners.exporting import Collapsed, collapse, export_experts
from lamella.tuners.mola import MolaConfig, MolaModel, allocate, redundancy
from lamella.tuners.molex import MolexConfig, MolexModel
from lamella.tuners.registry import LamellaType, register, rename_inner_lora, say_what_was_done
from lamella.tuners.summary import Summary

register(LamellaType.MOLA, MolaConfig, MolaModel)
register(LamellaType.MOLEX, MolexConfig, MolexModel)
rename_inner_lora()
say_what_was_done()

__all__ = [
    "Collapsed",
    "LamellaType",
    "MolaConfig",
    "MolaModel",
    "MolexConfig",
    "MolexModel",
    "Summary",
    "allocate",
    "collapse",
    "export_experts",
    "redundancy",
]
