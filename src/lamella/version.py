"""The version of this package and of its files, and what earlier versions meant by what they left out."""

from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version

__version__ = "0.2.0.dev4"

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
