"""MoLEx: each block mixes in another pretrained block of the model (arXiv 2503.11144)."""

from lamella.tuners.molex.block import MolexBlock
from lamella.tuners.molex.config import MolexConfig
from lamella.tuners.molex.model import MolexModel
from lamella.tuners.molex.search import best_fixed_layer

__all__ = ["MolexBlock", "MolexConfig", "MolexModel", "best_fixed_layer"]
