"""What ``with`` statements say about forwards, and for which they hold: those of the same flow of control.

A ``with`` statement belongs to the function that it stands in. It holds for what that function calls, in whatever
thread and context that is, and for threads and tasks that were started with a copy of its context; not for what runs
beside it. Where it stands in a generator that is suspended, it does not hold for those who iterate the generator.
"""

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, Literal, TypeVar

from lamella.compiling import between_graphs

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Said(Generic[T]):
    """What a statement says that has not ended.

    Attributes:
        what: holds.
        said_in: the interpreter's frame of the function whose ``with`` statement it is.
        iterated_by: where that function is a generator, the frame that has it run.
        thread: the one it was said in.
    """

    what: T
    said_in: FrameType
    iterated_by: FrameType | None
    thread: int


_HERE: ContextVar[tuple[Said[Any], ...]] = ContextVar("lamella_statements", default=())


class Statements(Generic[T]):
    """All statements of one kind that have not ended, whoever made them, the latest last."""

    def __init__(self) -> None:
        self._said: dict[Said[T], None] = {}

    def __reduce__(self) -> tuple[type["Statements[T]"], tuple[()]]:
        """A copied or pickled model begins with none: what was said holds for the model that was named."""
        return Statements, ()

    def elsewhere(self) -> Literal["thread", "generator"] | None:
        """In what else some stand where none holds for a forward that starts here and now."""
        said = tuple(self._said)
        if not said or self.here():
            return None
        if all(one.thread != threading.get_ident() for one in said):
            return "thread"
        here, running = _HERE.get(), set(_running())
        return "generator" if any(one in here and one.iterated_by in running for one in said) else None

    def latest(self) -> T | None:
        """The last of those that hold for a forward that starts here and now; None where there is none."""
        here = self.here()
        return here[-1] if here else None

    def here(self) -> list[T]:
        """Those that hold for a forward that starts here and now, the latest last."""
        return self._heard() if self._said else []

    @between_graphs("a with statement holds for the functions that run, and they are not traced")
    def _heard(self) -> list[T]:
        running, context = {frame: depth for depth, frame in enumerate(_running())}, _HERE.get()
        held = [
            said
            for said in tuple(self._said)
            if said.said_in in running or (said in context and said.iterated_by not in running)
        ]
        # A suspended generator is farther away than what runs or was said by a function.
        held.sort(key=lambda said: said.iterated_by is None or said.said_in in running)
        # A generator runs inside what its reader has said since.
        inwards = iter(sorted((one for one in held if one.said_in in running), key=lambda one: -running[one.said_in]))
        return [(next(inwards) if said.said_in in running else said).what for said in held]

    @contextmanager
    def saying(self, what: T) -> Iterator[None]:
        """Says something for the forwards of this flow of control."""
        said = Said(what, *_speaker(), threading.get_ident())
        self._said[said] = None
        _HERE.set((*_HERE.get(), said))
        try:
            yield
        finally:
            # Whatever has been said since stays, and a context in which this is still written holds nothing by it.
            del self._said[said]
            _HERE.set(tuple(other for other in _HERE.get() if other is not said))


def _running() -> Iterator[FrameType]:
    """The frames of the functions that are running in this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _speaker() -> tuple[FrameType, FrameType | None]:
    """The function whose ``with`` statement is being entered, and, if it is a generator, who has it run.

    Functions made into context managers, such as ``saying``, only pass on what their callers say.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _passes_on(frame):
        frame = frame.f_back
    assert frame is not None  # what contextlib runs was called by somebody
    iterated_by = frame if _is_generator(frame) else None
    while iterated_by is not None and _is_generator(iterated_by):  # one may delegate to the next
        iterated_by = iterated_by.f_back
    return frame, iterated_by


def _passes_on(frame: FrameType) -> bool:
    return _is_contextlibs(frame) or (
        _is_generator(frame) and frame.f_back is not None and _is_contextlibs(frame.f_back)
    )


def _is_contextlibs(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == "contextlib"


def _is_generator(frame: FrameType) -> bool:
    return bool(frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR))
