"""Metrics, intervals and floors on arrays and plain callables."""
