"""A mixture as plain LoRAs: one with a measured error, or each expert by itself."""

from lamella.convert.collapsing import Collapsed, collapse
from lamella.convert.exporting import export_experts

__all__ = ["Collapsed", "collapse", "export_experts"]
