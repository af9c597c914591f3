"""Compress and reroute: experts that share storage, and tokens that go to the most similar expert."""

from lamella.similarity.compression.grouping import METHODS
from lamella.similarity.compression.merging import Compressed, Report, compress
from lamella.similarity.compression.perplexity import (
    compression_curve,
    largest_compression,
    largest_in_words,
    rerouting_table,
)
from lamella.similarity.compression.pool import fold, folded_parameters
from lamella.similarity.compression.rerouting import Route, drop, find_routes, next_choice, reroute

__all__ = [
    "METHODS",
    "Compressed",
    "Report",
    "Route",
    "compress",
    "compression_curve",
    "drop",
    "find_routes",
    "fold",
    "folded_parameters",
    "largest_compression",
    "largest_in_words",
    "next_choice",
    "reroute",
    "rerouting_table",
]
