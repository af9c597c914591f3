"""Which LoRAs of a library help a task: found by their loss on a few examples."""

from lamella.retrieval.halving import Rung, plan_rungs
from lamella.retrieval.ranking import Scored, Shortlist, shortlist

__all__ = ["Rung", "Scored", "Shortlist", "plan_rungs", "shortlist"]
