"""Names of base models: the one by which others know a model, and the path it is loaded from here.

The laboratory knows its demo models under names of its own; it registers them when it is imported, which happens here
the first time that a name is asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import NamedTuple


class BaseNames(NamedTuple):
    """Who knows names; each function returns a name that it does not know as it was given.

    Attributes:
        published: from a name or path here to the name under which others find the model.
        located: from a name to the path that `from_pretrained` takes.
    """

    published: Callable[[str], str]
    located: Callable[[str], str]


_REGISTERED: list[BaseNames] = []


def register_base_names(names: BaseNames) -> None:
    """Adds names of base models to those that adapters and doctor understand."""
    _REGISTERED.append(names)


def published_name(name_or_path: str) -> str:
    """The name under which others find a model, where it has another one here."""
    for names in _known():
        name_or_path = names.published(name_or_path)
    return name_or_path


def located(name: str) -> str:
    """What `from_pretrained` takes for a model's name."""
    for names in _known():
        name = names.located(name)
    return name


def _known() -> Iterator[BaseNames]:
    with suppress(ModuleNotFoundError):  # pip install lamella, without the extra
        import_module("lamella.lab")
    yield from _REGISTERED
