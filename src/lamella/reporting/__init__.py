"""The report of a run: one HTML file that opens offline."""

from lamella.reporting.findings import Finding
from lamella.reporting.pictures import PictureGrid
from lamella.reporting.report import Report, render, write_report
from lamella.reporting.tokens import TokenLayer, TokenText, token_texts

__all__ = ["Finding", "PictureGrid", "Report", "TokenLayer", "TokenText", "render", "token_texts", "write_report"]
