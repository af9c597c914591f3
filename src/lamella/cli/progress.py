"""How far a command is: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from lamella.cli.output import console
from lamella.progress import Work, under_way, working

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_UNSEEN = 1.0  # what is done sooner is not shown: lines that come and go cannot be read


@contextmanager
def showing(name: str) -> Iterator[Work]:
    """Shows what is under way inside the context, as the work of this name; nothing is to be printed to a program then.

    Of several processes of one training the first shows it.
    """
    with working(name) as work:
        if os.environ.get("RANK", "0") != "0":
            yield work
        elif console.is_interactive:
            with Live(
                get_renderable=_bars, console=console, transient=True, refresh_per_second=8, redirect_stdout=False
            ):
                yield work
        else:
            done = threading.Event()
            threading.Thread(target=_say_lines, args=(done,), daemon=True).start()
            try:
                yield work
            finally:
                done.set()


def _bars() -> RenderableType:
    works = under_way(_SECONDS_UNSEEN)
    if not works:
        return Group()
    table = Table.grid(Column(overflow="ellipsis"), Column(no_wrap=True), Column(no_wrap=True), padding=(0, 1))
    for work in works:
        bar = ProgressBar(work.total, work.done, width=20, pulse=work.total is None)
        table.add_row(Text(work.name, no_wrap=True, overflow="ellipsis"), bar, Text(work.facts))
    return table


def _say_lines(done: threading.Event) -> None:
    while not done.wait(_SECONDS_BETWEEN_LINES):
        if works := under_way(_SECONDS_UNSEEN):
            console.print("; ".join(map(str, works)))
