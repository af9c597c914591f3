"""A hook of the site: the page of keys is made from the classes that read recipes, whenever the site is built."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lamella.lab.data.entry import Hub, TaskEntry
from lamella.lab.methods import Method
from lamella.lab.methods.base import all_methods
from lamella.lab.runs.settings import RunSettings
from lamella.lab.studies.composition import CompositionStudy
from lamella.lab.studies.continual import Continual
from lamella.lab.studies.grid import Grid
from lamella.lab.studies.search import Range, Searched

PAGE = "api/keys.md"
SECTIONS: dict[str, type[BaseModel]] = {
    "A run": RunSettings,
    "A study of methods": Grid,
    "A study of compositions": CompositionStudy,
    "A study of tasks one after the other": Continual,
    "The section search of a study": Searched,
    "A range in it": Range,
    "A task": TaskEntry,
    "The section hub of a task": Hub,
}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "with at least"}
_WORDS: dict[Any, str] = {
    str: "text", int: "whole number", float: "number", bool: "`true` or `false`", Any: "anything", dict: "keys",
    Method: "a method's name, or its name and settings", Searched: "its keys, below", Hub: "its keys, below",
    Range: "range, below",
}  # fmt: skip


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Called by mkdocs with each page."""
    return f"{markdown}\n{keys()}" if page.file.src_uri == PAGE else markdown


def keys() -> str:
    """The tables, as Markdown."""
    sections = [f"## {title}\n\n{_table(model)}" for title, model in SECTIONS.items()]
    methods = [f"### {name}\n\n{_summary(method)}\n\n{_table(method)}" for name, method in all_methods().items()]
    return "\n\n".join([*sections, "## The section method of a run", *methods]) + "\n"


def described(model: type[BaseModel]) -> dict[str, str]:
    """What each key of a model means, where it or the model's docstring says so."""
    told = dict(_attributes(model))
    return {name: field.description or told.get(name, "") for name, field in _fields(model).items()}


def _summary(model: type[BaseModel]) -> str:
    return inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0].replace("\n", " ")


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {
        name: field for name, field in model.model_fields.items() if not (name == "name" and issubclass(model, Method))
    }


def _attributes(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """What a docstring's section of attributes says, by name."""
    section = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    for name, words in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
        yield name, re.sub(r"\s+", " ", words).removesuffix(".")


def _table(model: type[BaseModel]) -> str:
    meant, fields = described(model), _fields(model)
    if not fields:
        return "It has no settings."
    heads = ["key", "value", "if absent", *["what it means"] * any(meant.values())]
    rows = [
        [f"`{name}`", _value(field), _default(field), *[meant[name]] * (len(heads) - 3)]
        for name, field in fields.items()
    ]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in [heads, ["---"] * len(heads), *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _value(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(one, name)}" for one in field.metadata for name, sign in _BOUNDS.items() if hasattr(one, name)
    ]
    return " ".join([_kind(field.annotation), *bounds])


def _kind(hint: Any) -> str:
    """A type in words."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in inside)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_kind(one) for one in inside if one is not type(None)))
    if hasattr(hint, "__metadata__"):
        return _kind(inside[0])
    if origin in (list, tuple, set):
        return f"list of {_kind(inside[0])}{'s' * (inside[0] in (str, int, float))}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "keys" if inside[1] is Any else f"{_kind(inside[1])} by name"
    return _WORDS[hint]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, Method):
        return f"`{value.name}`"
    if isinstance(value, BaseModel):
        return f"`{json.dumps(value.model_dump(mode='json'))}`"
    return f"`{json.dumps(value, default=list)}`" if value not in ("", [], {}, ()) else ""
