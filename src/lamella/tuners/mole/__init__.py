"""MOLE: LoRAs that are trained already, composed by learned routers that read the LoRAs' outputs (arXiv 2404.13628)."""

from lamella.tuners.mole.composing import compose
from lamella.tuners.mole.config import MoleConfig
from lamella.tuners.mole.layer import MoleLinear
from lamella.tuners.mole.model import MoleModel
from lamella.tuners.mole.overrides import fixed_weights, masked_experts

__all__ = ["MoleConfig", "MoleLinear", "MoleModel", "compose", "fixed_weights", "masked_experts"]
