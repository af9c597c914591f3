"""What the recipes of all studies have in common, and how one is read."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import Field
from typing_extensions import Self

from lamella.errors import LamellaError
from lamella.lab.methods import read_saved
from lamella.lab.runs.settings import RunSettings, override, read_recipe
from lamella.lab.schema import Settings, unknown_key

if TYPE_CHECKING:
    from lamella.lab.studies.cells import Cell
    from lamella.lab.studies.folder import StudyFolder
    from lamella.lab.studies.results import Results


_MOST_SEEDS = 1000
# what a run's setting is called in a study, by kind of study
_OF_STUDIES = {
    "model": ("backbones", "backbone"), "task": ("tasks", "sequence", "sources"), "tasks": ("sequence", "sources"),
    "seed": ("seeds",), "method": ("methods",),
}  # fmt: skip


@dataclass(frozen=True)
class TableOf:
    """Which rows one table of a study is about; ``parts`` of a study are united in a separate table.

    Attributes:
        metric: None where it is the main one of the task's runs.
        title: what the table calls the task.
    """

    backbone: str
    task: str
    metric: str | None
    title: str
    part: bool = False


@dataclass(frozen=True)
class Measured:
    """A study's tables, by the names of their files: results, examples and what else it has; and notes on them."""

    tables: Mapping[str, pd.DataFrame]
    notes: Sequence[str] = ()


class StudyRecipe(Settings):
    """A study as its recipe says it."""

    seeds: list[int] | int = Field(3, description="a list, or how many: 0, 1, ...")
    run: dict[str, Any] = Field(default_factory=dict, description="settings of every run")
    reference: str | None = Field(None, description="the method that the others are compared with; the first if absent")

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """As `Settings.parse`; a setting of its runs is told where it belongs."""
        for key in values:
            if key in cls.model_fields or key not in RunSettings.model_fields:
                continue
            if (called := _OF_STUDIES.get(key)) is None:
                way = f"write run.{key} for all of its runs, or methods.NAME.{key} for those of one method"
            else:
                way = f"a study has '{next(name for name in called if name in cls.model_fields)}'"
            raise LamellaError(f"'{key}' is a setting of one run, not of a study: {way}.")
        return super().parse(values, where)

    @property
    def seed_list(self) -> list[int]:
        """The seeds, one by one."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    @property
    def reference_name(self) -> str:
        """The method that the others are compared with."""
        return self.reference or self.names[0]

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Every method, in the order of the tables."""

    @property
    @abstractmethod
    def listed(self) -> list[str]:
        """The methods that the recipe names itself."""

    @property
    @abstractmethod
    def tables(self) -> list[TableOf]:
        """The tables that the study is shown in."""

    @abstractmethod
    def check(self) -> None:
        """Raise a LamellaError where keys do not fit each other."""

    @abstractmethod
    def cells(self) -> list[Cell]:
        """Every cell, seed by seed, so that an early look already compares.

        Raises:
            LamellaError: settings do not fit.
        """

    @abstractmethod
    def measured(self, cells: Sequence[Cell], folder: StudyFolder) -> Measured:
        """What the finished cells measured.

        Raises:
            LamellaError: a task cannot be loaded.
        """

    @abstractmethod
    def notes(self, cells: Sequence[Cell], folder: StudyFolder, results: Sequence[Results]) -> list[str]:
        """How the numbers were made, and what was made equal."""


def read_study(recipe: str, overrides: Iterable[str] = ()) -> StudyRecipe:
    """The study of a recipe, a file or a packaged one, with ``key=value`` changes; or of the folder of a study.

    Raises:
        LamellaError: there is no such recipe, it is not a study, or a key or value does not fit.
    """
    written = Path(recipe) / "study.yaml"
    tree = read_saved(read_recipe(str(written))) if written.is_file() else read_recipe(recipe)
    before = list(tree["methods"]) if isinstance(tree.get("methods"), Mapping) else []
    override(tree, overrides)
    _leave_out(tree, before)
    return study_of(tree, recipe)


def _leave_out(tree: dict[str, Any], before: Sequence[str]) -> None:
    """Take out the methods that a word such as ``methods.LoRA=null`` names.

    Args:
        tree: of the recipe, changed by the words.
        before: the methods that the recipe has.

    Raises:
        LamellaError: it has no such method, no other, or speaks of this one elsewhere.
    """
    methods = tree.get("methods")
    gone = [name for name, given in methods.items() if given is None] if isinstance(methods, Mapping) else []
    if not gone:
        return
    left = {name: given for name, given in tree["methods"].items() if given is not None}
    tree["methods"] = left
    needed = {
        "reference": [tree.get("reference") or before[0]] if before else [],
        "match": [tree.get("match")],
        "masked": tree.get("masked") or [],
        **{f"methods.{name}.loras": [given.get("loras")] for name, given in left.items() if isinstance(given, Mapping)},
    }
    for name in gone:
        check_name(name, before, "method")
        if needing := [key for key, names in needed.items() if name in names]:
            first = ", the first of a recipe that names none" if needing[0] == "reference" else ""
            raise LamellaError(
                f"methods.{name}=null leaves out the method that '{needing[0]}' names{first}. Give {needing[0]}= one "
                f"of those that are left ({', '.join(left) or 'none'}), or keep it."
            )


def study_of(tree: Mapping[str, Any], recipe: str = "study.yaml") -> StudyRecipe:
    """The study that a recipe says: of composition where it has ``sources``, of tasks one after the other where it has
    ``sequence``, of methods side by side with ``methods``.

    Raises:
        LamellaError: as `read_study`.
    """
    from lamella.lab.studies.composition import CompositionStudy
    from lamella.lab.studies.continual import Continual
    from lamella.lab.studies.grid import Grid

    if "arms" in tree:
        raise LamellaError(f"The recipe '{recipe}' has 'arms', which is called 'methods' now. Rename it.")
    if not {"methods", "sources"} & set(tree) and "model" in tree:
        raise LamellaError(f"The recipe '{recipe}' is one run. Give it to `lamella train`; a study has 'methods'.")
    kinds: dict[str, type[StudyRecipe]] = {"sources": CompositionStudy, "sequence": Continual}
    study = next((kind for key, kind in kinds.items() if key in tree), Grid).parse(tree)
    if isinstance(study.seeds, int) and study.seeds > _MOST_SEEDS:
        raise LamellaError(
            f"seeds={study.seeds} says how many, and at most {_MOST_SEEDS:,} are planned. One seed is seeds=[7]."
        )
    if not study.seed_list or len(set(study.seed_list)) < len(study.seed_list):
        raise LamellaError(f"seeds={study.seeds} must name at least one seed, and each of them once.")
    study.check()
    return study


def method_settings(values: Mapping[str, Any]) -> RunSettings:
    """Settings of a cell; one thread, since a study's speed comes from --jobs, and scores must not depend on cores."""
    return RunSettings.parse({"threads": 1, **values})


def check_name(name: str, known: Iterable[str], kind: str) -> None:
    """Raise a LamellaError with the nearest known name where ``name`` is not among them."""
    known = list(known)
    if name not in known:
        raise LamellaError(unknown_key(name, known).replace("setting", kind, 1))


def refuse_without_method(methods: Mapping[str, Mapping[str, Any]], example: str) -> None:
    """Raise a LamellaError where an entry does not say which method it is: forgotten, or a misspelt name."""
    for name, given in methods.items():
        if given.get("method") is None:
            others = [other for other in methods if other != name]
            near = difflib.get_close_matches(name, others, n=1, cutoff=0.5)
            hint = f"Did you mean 'methods.{near[0]}'? Else add" if near else "Add"
            raise LamellaError(
                f"methods.{name} does not say which method it is. {hint} a line 'method: {example}', or the word "
                f"methods.{name}.method={example}, for example. The others here are: {', '.join(others) or 'none'}."
            )


def settings_by_method(cells: Iterable[Cell]) -> Mapping[str, dict[str, Any]]:
    """What each method's runs were given, without what differs between the cells of a method."""
    seen: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if cell.method not in seen:
            seen[cell.method] = cell.settings.model_dump(mode="json", exclude={"seed", "model", "task"})
    return seen
