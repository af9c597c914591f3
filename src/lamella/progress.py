"""How far long work is: whoever does it says so, whoever wants to know listens.

A loop says it by `counted`, anything else by `working`. The command shows it; your own program may, by `listening`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_under_way: list[Work] = []  # the outermost first
_listeners: list[Callable[[Work], object]] = []


@dataclass(eq=False)
class Work:
    """Something that takes a while, and how far it is.

    Attributes:
        name: what is done, in words.
        total: of how many pieces; None where nobody knows.
        unit: what a piece is called, in the plural.
        done: how many are done, those of an earlier start among them.
        note: what else there is to say.
        parts: what other processes do of it.
    """

    name: str
    total: int | None = None
    unit: str = ""
    done: int = 0
    note: str = ""
    parts: Sequence[Work] = ()

    def __post_init__(self) -> None:
        self.begin(self.done, self.total)

    def begin(self, done: int, total: int | None) -> None:
        """Now it goes on, after so many pieces of an earlier start, which count in no rate."""
        self.done = self._first = done
        self.total = total
        self._began = self._reached = time.monotonic()  # one clock for all processes of a machine
        self._estimate: float | None = None

    def reach(self, done: int, *, left: float | None = None) -> None:
        """So many pieces are done; ``left`` seconds remain, where that is known better than by the rate."""
        self.done, self._reached, self._estimate = done, time.monotonic(), left
        for listener in list(_listeners):
            listener(self)

    def advance(self) -> None:
        """One more piece is done."""
        self.reach(self.done + 1)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    @property
    def rate(self) -> float | None:
        """Pieces per second of this start; None before the first."""
        done, seconds = self.done - self._first, self._reached - self._began
        return done / seconds if done > 0 and seconds > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds that remain; None where nothing is known yet, or it takes longer than was thought."""
        left = self._estimate
        if left is None and self.rate is not None and self.total is not None:
            left = (self.total - self.done) / self.rate
        left = None if left is None else left - (time.monotonic() - self._reached)
        return None if left is None or left <= 0 else left

    @property
    def facts(self) -> str:
        """How far it is in words: pieces, rate and time that is left."""
        if self.total is None and not self.done:
            return ", ".join(filter(None, [self.note, f"{_span(self.seconds)} so far"]))
        pieces = f"{self.done:,}{'' if self.total is None else f' of {self.total:,}'} {self.unit}".rstrip()
        rate = "" if self.rate is None else f"{self.rate:.2f}/s" if self.rate > 0.1 else f"{_span(1 / self.rate)} each"
        left = "" if self.left is None else f"{_span(self.left)} left"
        return ", ".join(filter(None, [pieces, self.note, rate, left]))

    def __str__(self) -> str:
        return f"{self.name}: {self.facts}"


@contextmanager
def working(name: str, total: int | None = None, unit: str = "", done: int = 0) -> Iterator[Work]:
    """Work that is under way inside the context; say with `Work.reach` how far it is."""
    work = Work(name, total, unit, done)
    _under_way.append(work)
    try:
        yield work
    finally:
        _under_way.remove(work)


def counted(items: Iterable[T], name: str, unit: str = "", total: int | None = None) -> Iterator[T]:
    """The items one by one, each a piece of work that is done when the next one is asked for."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with working(name, total, unit) as work:
        for item in items:
            yield item
            work.advance()


@contextmanager
def listening(listener: Callable[[Work], object]) -> Iterator[None]:
    """Inside the context, ``listener`` is called with each work of this process that got further, as it does."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def under_way(older_than: float = 0.0) -> list[Work]:
    """What is done now, the outermost first: what can be counted, named with what cannot be and is around it.

    Args:
        older_than: leaves out what began fewer seconds ago.
    """
    shown: list[Work] = []
    around: list[str] = []
    works = [work for work in list(_under_way) if work.seconds >= older_than]
    for work in works:
        around.append(work.name)
        if work.total is not None or (work is works[-1] and not work.parts):
            shown.append(copy.copy(work))
            shown[-1].name = ": ".join(around)
            around = []
        shown += work.parts
    return shown


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} h"
