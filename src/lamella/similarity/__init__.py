"""Which experts of a mixture, in which layers, can replace which, what a swap costs, and what can be merged.

Each step reads what the one before it left on disk: `capture`, then `screen`, `align`, `swap`, `compress`.
"""

from lamella.similarity.activations import Capture, capture, text_batches
from lamella.similarity.activations.norms import distributions
from lamella.similarity.alignment import align, beyond_controls, fit_aligners, seed_ceiling, sweep
from lamella.similarity.compression import (
    Compressed,
    compress,
    compression_curve,
    damages,
    find_routes,
    largest_compression,
    reroute,
    rerouting_table,
)
from lamella.similarity.planning import Plan, plan
from lamella.similarity.screening import choose_pairs, screen
from lamella.similarity.swapping import distance_regression, expert_pairs, layer_pairs, swap, swap_effects

__all__ = [
    "Capture",
    "Compressed",
    "Plan",
    "align",
    "beyond_controls",
    "capture",
    "choose_pairs",
    "compress",
    "compression_curve",
    "damages",
    "distance_regression",
    "distributions",
    "expert_pairs",
    "find_routes",
    "fit_aligners",
    "largest_compression",
    "layer_pairs",
    "plan",
    "reroute",
    "rerouting_table",
    "screen",
    "seed_ceiling",
    "swap",
    "swap_effects",
    "sweep",
    "text_batches",
]
