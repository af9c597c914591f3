"""What the routers of a model really did."""

from lamella.tracing.trace import COLUMNS, Trace, record_routing

__all__ = ["COLUMNS", "Trace", "record_routing"]
