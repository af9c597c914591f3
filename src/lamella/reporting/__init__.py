"""The report of a run: one HTML file that opens offline."""

from lamella.reporting.report import Report, render, write_report

__all__ = ["Report", "render", "write_report"]
