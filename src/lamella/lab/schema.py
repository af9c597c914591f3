"""The base of all settings: every key is known, and an error says which key and which one was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import Self

from lamella.errors import LamellaError
from lamella.tuners.config import RENAMED
from lamella.version import __version__


class Settings(BaseModel):
    """Validated values; unknown keys are refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Settings from plain values.

        Args:
            values: what a recipe or an override gives.
            where: what comes before these keys in the user's file, such as ``method.``.

        Raises:
            LamellaError: an unknown key (with the nearest known one) or a value that does not fit.
        """
        unknown = [key for key in values if key not in cls.model_fields]
        if unknown:
            raise LamellaError(unknown_key(unknown[0], cls.model_fields, where))
        try:
            return cls(**values)
        except ValidationError as error:
            raise LamellaError(_explain(error, values, where, cls.model_fields)) from error

    def written(self) -> dict[str, Any]:
        """Plain values for a file, and the version that writes it: a later one then knows what they meant."""
        return {"lamella_version": __version__, **self.model_dump(mode="json")}


def unknown_key(key: str, known: Iterable[str], where: str = "") -> str:
    """The paragraph that refuses ``key`` and names the nearest of the known ones."""
    known = list(known)
    if (new := RENAMED.get(key)) in known:
        return f"The setting '{where}{key}' is called '{where}{new}' now."
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f"Did you mean '{where}{near[0]}'? " if near else ""
    return f"There is no setting '{where}{key}'. {hint}Known here are: {', '.join(known)}."


def _explain(error: ValidationError, values: Mapping[str, Any], where: str, fields: Mapping[str, FieldInfo]) -> str:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, LamellaError):
        return str(cause)
    if first["type"] == "missing":
        key = str(first["loc"][-1])
        place = where + ".".join((*_typed(first["loc"], values), key))
        meant = fields[key].description if len(first["loc"]) == 1 else None
        return (
            f"The setting '{place}' is missing{f': {meant}' if meant else ''}. Add a line '{key}: VALUE', or the word "
            f"{place}=VALUE."
        )
    place = where + ".".join(_typed(first["loc"], values))
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"The setting '{place}' cannot be {first['input']!r}: {reason}."


def _typed(place: Sequence[int | str], values: Any) -> Iterator[str]:
    """The keys of a place that were typed; between them pydantic names the kinds of value that it tried."""
    for part in place:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            continue
        yield str(part)
