"""Telling a recipe from `key=value` words."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.errors import LamellaError


def recipe_and_overrides(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The one word without ``=``, if any, and the others.

    Raises:
        LamellaError: more than one word has no ``=``.
    """
    recipes = [word for word in words if "=" not in word]
    if len(recipes) > 1:
        raise LamellaError(f"One recipe at a time: {' and '.join(recipes)} were given. Write settings as key=value.")
    return (recipes[0] if recipes else None), [word for word in words if "=" in word]
