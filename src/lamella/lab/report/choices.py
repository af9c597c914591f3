"""What MoLEx chose for which texts, as tables that open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamella.lab.report.sections import draw, section
from lamella.lab.report.tables import frame_table

if TYPE_CHECKING:
    from markupsafe import Markup

    from lamella.lab.report.report import Report


@section("Choices", 30)
def choices_section(report: Report) -> Markup | None:
    """Which block each layer chose, by policy."""
    tables = [frame_table(frame, caption, missing="none") for caption, frame in report.choices.items()]
    return draw("choices", tables) if tables else None
