"""What can be said of every ordered pair of experts without training an aligner."""

from lamella.similarity.screening.pairs import Pair, all_pairs, choose_pairs
from lamella.similarity.screening.table import MEASURES, screen

__all__ = ["MEASURES", "Pair", "all_pairs", "choose_pairs", "screen"]
