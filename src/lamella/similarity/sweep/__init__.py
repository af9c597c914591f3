"""All pairs of a model: what they will cost, and their alignment as independent tiles, here or on a Ray cluster."""

from lamella.similarity.sweep.plan import Plan, plan
from lamella.similarity.sweep.sweep import sweep
from lamella.similarity.sweep.tiles import Tile, cut

__all__ = ["Plan", "Tile", "cut", "plan", "sweep"]
