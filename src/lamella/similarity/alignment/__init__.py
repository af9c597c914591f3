"""Aligners before frozen experts: trained for many pairs at once, scored on held-out documents, beside controls."""

from lamella.aligners import KINDS, Aligner, make_aligner
from lamella.similarity.alignment.controls import beyond_controls, random_expert, seed_ceiling
from lamella.similarity.alignment.pull import Pull
from lamella.similarity.alignment.run import align, fit_aligners
from lamella.similarity.alignment.sweeping import sweep
from lamella.similarity.alignment.table import COLUMNS, write_alignment

__all__ = [
    "COLUMNS",
    "KINDS",
    "Aligner",
    "Pull",
    "align",
    "beyond_controls",
    "fit_aligners",
    "make_aligner",
    "random_expert",
    "seed_ceiling",
    "sweep",
    "write_alignment",
]
