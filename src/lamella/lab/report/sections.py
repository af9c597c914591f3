"""The sections of a report between its costs and its findings: each is one registered function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

from lamella.lab.report.pages import page_environment
from lamella.lab.report.tables import frame_table

if TYPE_CHECKING:
    from lamella.lab.report.report import Report

# finished HTML, or tables by caption, the first column of each "method"
Content = Markup | Mapping[str, pd.DataFrame]
Maker = Callable[["Report"], Content | None]


@dataclass(frozen=True)
class Registered:
    """A section that reports may have.

    Attributes:
        title: its heading.
        place: sections stand in this order.
        make: what it shows of a report; None where the report has nothing for it.
        absent: what the page says is not recorded where there is nothing.
        script: file of the script that it runs, which the page's policy then allows.
        pictures: whether it shows pictures, which the page's policy then allows.
    """

    title: str
    place: int
    make: Maker
    absent: str | None
    script: str | None
    pictures: bool


@dataclass(frozen=True)
class Section:
    """A section as the page draws it."""

    title: str
    content: Markup
    registered: Registered

    @property
    def anchor(self) -> str:
        """What links on the page point at."""
        return self.title.lower().replace(" ", "-")


REGISTERED: dict[str, Registered] = {}


def section(
    title: str, place: int, *, absent: str | None = None, script: str | None = None, pictures: bool = False
) -> Callable[[Maker], Maker]:
    """Register a function that gives what a section shows; the arguments are those of `Registered`.

    It reads the report, and of ``report.about`` the study, run or trace itself.
    """

    def register(make: Maker) -> Maker:
        REGISTERED[title] = Registered(title, place, make, absent, script, pictures)
        return make

    return register


def sections_of(report: Report) -> tuple[list[Section], list[str]]:
    """The sections that have something to show, in their order, and what is not recorded."""
    shown, absent = [], []
    for one in sorted(REGISTERED.values(), key=lambda one: one.place):
        content = one.make(report)
        if content:
            drawn = content if isinstance(content, Markup) else _tables(content)
            shown.append(Section(one.title, drawn, one))
        elif one.absent is not None:
            absent.append(one.absent)
    return shown, absent


def draw(macro: str, *views: Any) -> Markup:
    """What a macro of ``sections.html.j2`` makes of views."""
    drawn: Markup = getattr(page_environment().get_template("sections.html.j2").module, macro)(*views)
    return drawn


def _tables(frames: Mapping[str, pd.DataFrame]) -> Markup:
    return draw("frames", [frame_table(frame, caption, missing="none") for caption, frame in frames.items()])
