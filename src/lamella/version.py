"""The version of this package, and of the files that it writes."""

__version__ = "0.2.0.dev0"
