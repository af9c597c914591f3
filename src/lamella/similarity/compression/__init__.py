"""Compress and reroute: fewer experts, and tokens that go to the most similar expert."""

from lamella.similarity.compression.compressed import Compressed, Report, Settings, compress
from lamella.similarity.compression.criteria import CRITERIA
from lamella.similarity.compression.perplexity import (
    CURVES,
    advised,
    by_settings,
    compression_curve,
    differing,
    largest_compression,
    largest_in_words,
    rerouting_table,
    verdict,
)
from lamella.similarity.compression.pool import fold
from lamella.similarity.compression.rerouting import drop, next_choice, reroute
from lamella.similarity.compression.routes import Route, find_routes
from lamella.similarity.compression.saving import Saved
from lamella.similarity.compression.serving import damages

__all__ = [
    "CRITERIA",
    "CURVES",
    "Compressed",
    "Report",
    "Route",
    "Saved",
    "Settings",
    "advised",
    "by_settings",
    "compress",
    "compression_curve",
    "damages",
    "differing",
    "drop",
    "find_routes",
    "fold",
    "largest_compression",
    "largest_in_words",
    "next_choice",
    "reroute",
    "rerouting_table",
    "verdict",
]
