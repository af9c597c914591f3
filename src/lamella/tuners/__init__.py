"""The PEFT methods. Importing this package registers them with PEFT."""

from lamella.tuners.mola import MolaConfig, MolaModel, allocate
from lamella.tuners.mole import MoleConfig, MoleModel, compose, fixed_weights, masked_experts
from lamella.tuners.molex import MolexConfig, MolexModel
from lamella.tuners.redundancy import redundancy
from lamella.tuners.registry import (
    LamellaType,
    name_what_is_damaged,
    read_saved_configs,
    register,
    rename_tensors,
    say_what_was_done,
)
from lamella.tuners.summary import Summary

register(LamellaType.MOLA, MolaConfig, MolaModel)
register(LamellaType.MOLEX, MolexConfig, MolexModel)
register(LamellaType.MOLE, MoleConfig, MoleModel)
read_saved_configs()
rename_tensors()
name_what_is_damaged()
say_what_was_done()

__all__ = [
    "LamellaType",
    "MolaConfig",
    "MolaModel",
    "MoleConfig",
    "MoleModel",
    "MolexConfig",
    "MolexModel",
    "Summary",
    "allocate",
    "compose",
    "fixed_weights",
    "masked_experts",
    "redundancy",
]
