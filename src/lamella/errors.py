"""The errors a user can mend: each message is one paragraph that names the culprit and the way out."""

from importlib import import_module
from typing import Any


class LamellaError(ValueError):
    """Something the caller gave cannot be used. The command prints the message alone and exits with status 2."""


class UnreadableError(LamellaError):
    """A file is missing, damaged, or holds something else than its name says."""


class CannotMergeError(LamellaError, NotImplementedError):
    """A layer whose experts are routed per token has no single weight it could be merged into."""


def optional_module(module: str, use: str, extra: str = "lab") -> Any:
    """The module of that name, which only ``use`` needs.

    Raises:
        LamellaError: it, or a package that it imports, is not installed; the message says what to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        if missing == __package__:
            raise
        raise LamellaError(f"{use} needs {missing}, which is not installed: pip install 'lamella[{extra}]'.") from error
