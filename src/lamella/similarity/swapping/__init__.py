"""Experts, routers or whole blocks in each other's place, and what that costs."""

from lamella.similarity.swapping.distance import (
    change_in_words,
    distance_regression,
    distance_regressions,
    regression_in_words,
)
from lamella.similarity.swapping.effects import kinds, layer_tables, swap_effects, swap_table
from lamella.similarity.swapping.exchange import randomised, swap
from lamella.similarity.swapping.scores import Metric, TextScores, text_scores
from lamella.similarity.swapping.shift import routing_shift
from lamella.similarity.swapping.units import RANDOM, Named, Swap, Unit, control_swaps, expert_pairs, layer_pairs

__all__ = [
    "RANDOM",
    "Metric",
    "Named",
    "Swap",
    "TextScores",
    "Unit",
    "change_in_words",
    "control_swaps",
    "distance_regression",
    "distance_regressions",
    "expert_pairs",
    "kinds",
    "layer_pairs",
    "layer_tables",
    "randomised",
    "regression_in_words",
    "routing_shift",
    "swap",
    "swap_effects",
    "swap_table",
    "text_scores",
]
