"""Compress and reroute: experts that share storage, and tokens that go to the most similar expert."""

from lamella.similarity.compress.choosing import METHODS
from lamella.similarity.compress.comparing import rerouting_table
from lamella.similarity.compress.compression import Compressed, compress
from lamella.similarity.compress.curve import compression_curve, largest_compression
from lamella.similarity.compress.folding import fold, folded_parameters
from lamella.similarity.compress.report import Report
from lamella.similarity.compress.rerouting import drop, next_choice, reroute
from lamella.similarity.compress.routes import Route, find_routes

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
