"""The report of a run: one HTML file that opens offline.

Importing this package imports every module in it, so that a section is registered by lying here.
"""

import importlib
import pkgutil

from lamella.lab.report.pictures import PictureGrid
from lamella.lab.report.report import Report, render, write_report
from lamella.lab.report.sections import section
from lamella.lab.report.tokens import TokenLayer, TokenText, token_texts

__all__ = [
    "PictureGrid",
    "Report",
    "TokenLayer",
    "TokenText",
    "render",
    "section",
    "token_texts",
    "write_report",
]

for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
