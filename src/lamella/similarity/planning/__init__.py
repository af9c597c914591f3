"""What the alignment of all pairs of a model will cost, before it starts."""

from lamella.similarity.planning.plan import Plan, plan

__all__ = ["Plan", "plan"]
