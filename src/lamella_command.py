"""The start of the `lamella` command, beside the package: help, version and completion load no torch.

Importing lamella registers its methods with PEFT and so loads torch, which takes seconds. The command's modules
need none of it before a command runs, so their package stands here without its content until then.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec, module_from_spec

# What the command imports beside the library: the extra `lab` of pyproject.toml.
LAB = ("datasets", "jinja2", "pandas", "pyarrow", "pydantic", "rich", "sklearn", "typer", "yaml")
_INTERRUPTED = 130


def main() -> None:
    """Run the command, or say in one sentence what to install for it."""
    take_over(_run)


def take_over(run: Callable[[], None]) -> None:
    """Run what the process is for, with Ctrl-C in hand from its imports to its end.

    While modules are loaded, and when all is done, there is nothing to unwind; in between ``run`` says what is kept.
    """
    _end_when_interrupted("Interrupted before anything began.\n")
    at_last = "Interrupted when all was done and written.\n"
    try:
        run()
    except SystemExit as end:
        at_last = "" if end.code == _INTERRUPTED else at_last
        raise
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        _end_when_interrupted(at_last)


def _end_when_interrupted(sentence: str) -> None:
    """Let Ctrl-C end the process at once, with a sentence; not where it is ignored, as under nohup."""

    def end(*_: object) -> None:
        # a bar of loading may be on the terminal, which has no cursor then
        os.write(2, ("\r\x1b[2K\x1b[?25h" * os.isatty(2) + sentence).encode())
        os._exit(_INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)


def _run() -> None:
    missing = [name for name in LAB if find_spec(name) is None]
    if missing:
        print(
            f"The lamella command needs {', '.join(missing)}, not installed here: pip install 'lamella[lab]'.",
            file=sys.stderr,
        )
        sys.exit(2)
    load_library = _postponed_library()
    from lamella.cli import main as command

    command(load_library)


def _postponed_library() -> Callable[[], None]:
    """Put the package without its content into place, unless it is loaded; returns what fills it."""
    spec = find_spec("lamella")
    if "lamella" in sys.modules or spec is None or spec.loader is None:
        return lambda: None
    package, loader = module_from_spec(spec), spec.loader
    sys.modules["lamella"] = package
    return lambda: loader.exec_module(package)


if __name__ == "__main__":
    main()
