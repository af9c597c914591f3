"""What can be said of every ordered pair of experts without training an aligner."""

from lamella.similarity.pairs import Pair, all_pairs, choose_pairs
from lamella.similarity.screening.table import MEASURES, QUICK_MEASURES, default_measures, screen

__all__ = ["MEASURES", "QUICK_MEASURES", "Pair", "all_pairs", "choose_pairs", "default_measures", "screen"]
