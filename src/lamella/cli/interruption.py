"""Ctrl-C: what is under way ends in order, with one sentence; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 130  # of a process that SIGINT ended, as shells have it
_UNTIL_AGAIN = 0.1  # seconds
_CLEARED = "\r\x1b[2K\x1b[?25h"  # the line that was begun on a terminal goes, and the cursor is back


@contextmanager
def interruptible(sentence: str) -> Iterator[None]:
    """Where Ctrl-C is pressed inside the context, the command ends with a sentence and status 130.

    What runs is unwound by a KeyboardInterrupt, so that nothing is left half-written. Whatever that turns into on its
    way, such as an error of an import, the command ends.
    """
    pressed, last_words = False, f"{textwrap.fill(sentence, 100, break_long_words=False, break_on_hyphens=False)}\n"

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            # past Python's buffers, which what was interrupted may hold
            os.write(2, f"{_CLEARED if os.isatty(2) else ''}{last_words}".encode())
            os._exit(STATUS)
        pressed = True
        raise KeyboardInterrupt

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        nonlocal pressed
        if not isinstance(what.exc_value, KeyboardInterrupt):
            unraisable_before(what)
            return
        pressed = False  # Python drops what is raised while an object is deleted, for one: again, a little later
        threading.Timer(_UNTIL_AGAIN, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()

    before, unraisable_before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if before is not signal.SIG_IGN:  # as it is under nohup
        signal.signal(signal.SIGINT, press)
        sys.unraisablehook = unraisable
    try:
        yield
    except BaseException as error:
        if not pressed and not isinstance(error, KeyboardInterrupt):
            raise
        pressed = True
        # a terminal has shown ^C
        print(f"{_CLEARED if sys.stderr.isatty() else ''}{last_words}", end="", file=sys.stderr, flush=True)
        last_words = ""
        sys.exit(STATUS)
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = unraisable_before
