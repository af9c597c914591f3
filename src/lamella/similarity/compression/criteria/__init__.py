"""Which experts of a layer go first: one decorated function each, for those that are dropped, replaced and merged."""

from lamella.similarity.compression.criteria import aligning, dropping, merging, replacing  # noqa: F401  (they register)
from lamella.similarity.compression.criteria.registry import (
    CRITERIA,
    Action,
    Criterion,
    Ranking,
    criterion,
    find_criterion,
)

__all__ = ["CRITERIA", "Action", "Criterion", "Ranking", "criterion", "find_criterion"]
