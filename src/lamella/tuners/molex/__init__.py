"""MoLEx: each block mixes in another pretrained block of the model (arXiv 2503.11144)."""

from lamella.tuners.molex.aligning import align_guests
from lamella.tuners.molex.block import MolexBlock
from lamella.tuners.molex.config import MolexConfig
from lamella.tuners.molex.model import MolexModel
from lamella.tuners.molex.search import best_fixed_layer
from lamella.tuners.molex.second_model import SecondModel

__all__ = ["MolexBlock", "MolexConfig", "MolexModel", "SecondModel", "align_guests", "best_fixed_layer"]
