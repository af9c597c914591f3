"""Versions: of this package and of the libraries below it, and of its files, with what earlier ones left out."""

import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

__version__ = "0.2.0"

FIRST_VERSION = "0.1.0"  # it wrote the files that do not name their version


def is_version(written: Any) -> bool:
    """Whether a file names a version in what it says of its writer."""
    try:
        return isinstance(written, str) and bool(Version(written))
    except InvalidVersion:
        return False


def defaults_of(writer: str, former: Mapping[str, Mapping[str, dict[str, Any]]], kind: str) -> dict[str, Any]:
    """What a version meant by settings that its file leaves out, where today's defaults are others.

    Args:
        writer: the version.
        former: defaults that have moved, by the last version that had them, by kind, by setting.
        kind: whose settings they are.
    """
    defaults: dict[str, Any] = {}
    for last in sorted(map(Version, former), reverse=True):  # the oldest that still holds is the right one
        if Version(writer) <= last:
            defaults |= former[str(last)].get(kind, {})
    return defaults


def requirements() -> list[Requirement]:
    """What lamella asks for, those of its extras too; nothing where it runs from a folder and is not installed."""
    try:
        return [Requirement(line) for line in requires("lamella") or ()]
    except PackageNotFoundError:
        return []


def installed_version(name: str) -> str | None:
    """The version of a package that is installed; None where it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def warn_of_untested() -> None:
    """Warns of each library that is here in a version outside the range that lamella's tests have passed with.

    Those are the requirements with an upper end: of the others lamella needs nothing that moves.
    """
    for wanted in requirements():
        ends = sorted(map(str, wanted.specifier), reverse=True)  # ">=" before "<"
        if not any(end.startswith("<") for end in ends):
            continue
        found = installed_version(wanted.name)
        if found is not None and not wanted.specifier.contains(found, prereleases=True):
            tested = f"{wanted.name}{','.join(ends)}"
            warnings.warn(
                f"lamella {__version__} is tested with {tested}, and {wanted.name} {found} is installed, with which it "
                f"may fail or compute something else: pip install '{tested}'.",
                stacklevel=3,
            )
