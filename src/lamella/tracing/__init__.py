"""What the routers of a model really did."""

from lamella.tracing.trace import COLUMNS, TOKEN_COLUMNS, Trace, record_routing

__all__ = ["COLUMNS", "TOKEN_COLUMNS", "Trace", "record_routing"]
