"""What the routers of a model really did."""

from lamella.tracing.trace import COLUMNS, NATIVE, TOKEN_COLUMNS, Trace, record_routing

__all__ = ["COLUMNS", "NATIVE", "TOKEN_COLUMNS", "Trace", "record_routing"]
