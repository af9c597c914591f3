"""`lamella info`: what is installed here, and where things lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lamella.cli.output import print_json
from lamella.version import installed_version, requirements

_PUBLIC = ("lab", "demo", "diffusion", "search", "ray", "browser")  # the extras that users install


def info(json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False) -> None:
    """Show versions, devices, where caches lie, and which extras are installed: what a report of a fault should hold.

    Example: lamella info
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    from lamella.lab.data.assets import cache_folder
    from lamella.lab.runs.folder import environment

    found = environment() | {
        "extras": {extra: list(missing(extra)) for extra in _PUBLIC},
        "folders": {
            "demo models and data (LAMELLA_CACHE)": str(cache_folder()),
            "task data (LAMELLA_DATA)": os.environ.get("LAMELLA_DATA", ""),
            "hub models (HF_HUB_CACHE)": HF_HUB_CACHE,
        },
    }
    if json:
        print_json(found)
    else:
        typer.echo("\n".join(_lines(found)))


def missing(extra: str) -> Iterator[str]:
    """What an extra asks for and is not here, or here in another version; with the extras that it names itself."""
    for wanted in requirements():
        if (
            wanted.marker is None
            or not wanted.marker.evaluate({"extra": extra})
            or wanted.marker.evaluate({"extra": ""})
        ):
            continue
        if wanted.name == "lamella":
            for inner in sorted(wanted.extras):
                yield from missing(inner)
        elif not ((found := installed_version(wanted.name)) and wanted.specifier.contains(found, prereleases=True)):
            yield f"{wanted.name}{wanted.specifier}"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    for name, number in found["packages"].items():
        yield f"{name} {number}"
    yield f"Python {found['python']} on {found['system']}"
    devices = ", ".join(found["accelerators"]) or "no accelerator"
    yield f"{devices}; {found['cores']} cores of {found['processor']}, {found['threads']} thread(s)"
    for extra, lacking in found["extras"].items():
        yield f"extra {extra}: " + (
            f"lacks {', '.join(lacking)}: pip install 'lamella[{extra}]'" if lacking else "installed"
        )
    for name, folder in found["folders"].items():
        yield f"{name}: {folder or 'not set'}"
