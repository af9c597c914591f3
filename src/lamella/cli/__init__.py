"""The `lamella` command."""

from lamella.cli.app import main

__all__ = ["main"]
