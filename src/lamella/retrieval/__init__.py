"""Which LoRAs of a library help a task: found by their loss on a few examples."""

from lamella.retrieval.halving import Rung, plan_rungs
from lamella.retrieval.inputs import Inputs, mean_inputs
from lamella.retrieval.ranking import Scored, Shortlist, shortlist

__all__ = ["Inputs", "Rung", "Scored", "Shortlist", "mean_inputs", "plan_rungs", "shortlist"]
