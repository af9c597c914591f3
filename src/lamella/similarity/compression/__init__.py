"""Compress and reroute: experts that share storage, and tokens that go to the most similar expert."""

from lamella.similarity.compression.choosing import METHODS
from lamella.similarity.compression.comparing import rerouting_table
from lamella.similarity.compression.compression import Compressed, compress
from lamella.similarity.compression.curve import compression_curve, largest_compression
from lamella.similarity.compression.folding import fold, folded_parameters
from lamella.similarity.compression.report import Report
from lamella.similarity.compression.rerouting import drop, next_choice, reroute
from lamella.similarity.compression.routes import Route, find_routes

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
    "next_choice",
    "reroute",
    "rerouting_table",
]
