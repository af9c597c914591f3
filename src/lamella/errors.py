"""The errors a user can mend: each message is one paragraph that names the culprit and the way out."""

from importlib import import_module
from typing import Any


class LamellaError(ValueError):
    """Something the caller gave cannot be used. The command prints the message alone and exits with status 2."""


class CannotMergeError(LamellaError, NotImplementedError):
    """A layer whose experts are routed per token has no single weight it could be merged into."""


def optional_module(package: str, use: str) -> Any:
    """The module ``package``, which only ``use`` needs.

    Raises:
        LamellaError: it is not installed; the message says what to install.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise LamellaError(f"{use} needs {package}, which is not installed: pip install 'lamella[lab]'.") from error
