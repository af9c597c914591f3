"""All packaged studies with what is kept of them, of methods and of compositions."""

from __future__ import annotations

from pathlib import Path

from lamella.lab.evidence import evidence
from lamella.lab.evidence.evidence import KeptStudy
from lamella.lab.runs.settings import recipe_names
from lamella.lab.studies.composition.grid import is_composition
from lamella.lab.studies.composition.kept import keep_composition, load_composition


def composition_names() -> list[str]:
    """The packaged recipes that are studies of composition."""
    return [name for name in recipe_names() if is_composition(name)]


def keep_study(folder: Path, into: Path) -> str:
    """Copy a finished study's rows from its folder, named as its recipe, into the folder of kept ones; gives its name.

    Raises:
        LamellaError: no packaged recipe has that name, the study is not finished, or it is not what the recipe plans.
    """
    return keep_composition(folder, into) if folder.name in composition_names() else evidence.keep(folder, into)


def kept_studies(folder: Path) -> list[KeptStudy]:
    """Every packaged study; one of which nothing is kept was not run.

    Raises:
        LamellaError: a recipe has changed since its study was run, or a file is missing.
    """
    return [
        *(evidence.load_study(name, folder) for name in evidence.study_names()),
        *(load_composition(name, folder) for name in composition_names()),
    ]
