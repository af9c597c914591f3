"""The report of a run: one HTML file that opens offline."""

from lamella.lab.report.findings import Finding
from lamella.lab.report.pictures import PictureGrid
from lamella.lab.report.report import Report, render, write_report
from lamella.lab.report.tokens import TokenLayer, TokenText, token_texts

__all__ = ["Finding", "PictureGrid", "Report", "TokenLayer", "TokenText", "render", "token_texts", "write_report"]
