"""What a study of composition runs: a head, a LoRA per source and one for all, then every way to put them together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from lamella.errors import LamellaError
from lamella.training.grid import Cell
from lamella.training.rows import StudyFolder
from lamella.training.schema import Settings, unknown_key
from lamella.training.settings import RunSettings, override, read_recipe

HEAD, JOINT, HELD_OUT = "no LoRA", "joint LoRA", "held out"


class CompositionGrid(Settings):
    """A study of composition as its recipe says it.

    The head is trained once per seed, with the backbone frozen, on the training rows of all sources, and is frozen from
    then on: all LoRAs and all arms share it, and differ in their deltas alone.
    """

    backbone: str
    sources: dict[str, str] = Field(min_length=2, description="the task that each LoRA learns, by a name for it")
    held_out: dict[str, str] = Field(description="tasks that no LoRA learns, by a name for them")
    seeds: list[int] | int = Field(3, description="a list, or how many: 0, 1, ...")
    lora: dict[str, Any] = Field(
        description="settings of LoRA, and of the runs that train the sources' and the joint one"
    )
    head: dict[str, Any] = Field(default_factory=dict, description="settings of the run that trains the head")
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1, description="by the name that tables show: 'method', and any setting of a run that is its own"
    )
    rows: int = Field(256, gt=0, description="that arms are fitted on: validation rows of the sources, unseen by LoRAs")
    test_rows: int | None = Field(None, gt=0, description="of each source and held-out task; all if absent")
    run: dict[str, Any] = Field(default_factory=dict, description="settings of every run")
    reference: str | None = Field(None, description="the arm that the others are compared with; the first if absent")

    @property
    def seed_list(self) -> list[int]:
        """The seeds, one by one."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    @property
    def reference_name(self) -> str:
        """The arm that the others are compared with."""
        return self.reference or next(iter(self.arms))

    @property
    def union(self) -> str:
        """The task of all sources together."""
        return f"mix:{'+'.join(self.sources.values())}"

    @property
    def names(self) -> list[str]:
        """Everything that is scored, in the order of the tables."""
        return [*self.arms, *map(alone, self.sources), JOINT, HEAD]

    @property
    def tests(self) -> dict[str, str]:
        """The tasks that everything is scored on."""
        return {**self.sources, **self.held_out}


def alone(source: str) -> str:
    """What tables call a source's LoRA by itself."""
    return f"{source} LoRA"


@dataclass(frozen=True)
class StagedCell(Cell):
    """A run that may rest on others: the key names them by their keys, the settings by where they lie.

    Attributes:
        identity: the settings, as JSON, with keys in place of paths.
    """

    identity: str = ""

    @property
    def key(self) -> str:
        """Names the settings and all that they rest on, wherever that lies."""
        return hashlib.sha256(self.identity.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Stages:
    """The cells of a study, each stage resting on those before it: heads, LoRAs, arms."""

    heads: list[StagedCell]
    loras: list[StagedCell]
    arms: list[StagedCell]

    @property
    def all(self) -> list[StagedCell]:
        """In the order in which they can be run."""
        return [*self.heads, *self.loras, *self.arms]


def is_composition(recipe: str) -> bool:
    """Whether a recipe is a study of composition."""
    return "sources" in read_recipe(recipe)


def read_composition(recipe: str, overrides: Iterable[str] = ()) -> CompositionGrid:
    """The study of a recipe, a file or a packaged one, with ``key=value`` changes.

    Raises:
        LamellaError: there is no such recipe, or a key or value does not fit.
    """
    tree = read_recipe(recipe)
    override(tree, overrides)
    grid = CompositionGrid.parse(tree)
    if not grid.seed_list or len(set(grid.seed_list)) < len(grid.seed_list):
        raise LamellaError(f"seeds={grid.seeds} must name at least one seed, and each of them once.")
    if grid.reference_name not in grid.arms:
        raise LamellaError(unknown_key(grid.reference_name, grid.arms).replace("setting", "arm for 'reference'", 1))
    if lacking := [name for name, own in grid.arms.items() if not isinstance(own.get("method"), str | dict)]:
        raise LamellaError(f"arms.{lacking[0]} says not which method it is. Add a line 'method: uniform', for example.")
    places = {"run.": grid.run, "lora.": grid.lora, "head.": grid.head}
    places |= {f"arms.{name}.": own for name, own in grid.arms.items()}
    for place, own in places.items():
        if given := [key for key in ("model", "task", "seed") if key in own]:
            raise LamellaError(f"{place}{given[0]} follows from the study's backbone, sources and seeds. Leave it out.")
    if len(set(grid.names) | set(grid.tests)) < len(grid.names) + len(grid.sources) + len(grid.held_out):
        raise LamellaError(
            "Arms, sources and held-out tasks need different names, other than those of the LoRAs alone."
        )
    return grid


def stages_of(grid: CompositionGrid, folder: StudyFolder) -> Stages:
    """Every cell, seed by seed.

    Raises:
        LamellaError: settings do not fit.
    """
    heads, loras, arms = [], [], []
    for seed in grid.seed_list:
        head = _cell(grid, HEAD, grid.union, seed, grid.backbone, {"method": "head", **grid.head})
        of_base = base_folder(folder, head)
        base = {of_base: f"head:{head.key}"}
        lora = {**grid.lora, "method": {"name": "lora-only", **grid.lora.get("method", {})}}
        own = {name: _cell(grid, alone(name), task, seed, of_base, lora, base) for name, task in grid.sources.items()}
        joint = _cell(grid, JOINT, grid.union, seed, of_base, lora, base)
        adapters = {name: str(folder.run(cell.key)) for name, cell in own.items()}
        places = {**base, **{adapters[name]: f"lora:{cell.key}" for name, cell in own.items()}}
        heads.append(head)
        loras += [*own.values(), joint]
        for name, settings in grid.arms.items():
            stated = settings["method"]
            method = {**({"name": stated} if isinstance(stated, str) else stated), "adapters": adapters}
            values = {"limit": {"train": grid.rows}, **settings, "method": method}
            arms.append(_cell(grid, name, f"held:{grid.union}", seed, of_base, values, places))
    return Stages(heads, loras, arms)


def base_folder(folder: StudyFolder, head: Cell) -> str:
    """Where the backbone with a head lies as one model."""
    return str(folder.path / "bases" / head.key)


def _cell(
    grid: CompositionGrid,
    name: str,
    task: str,
    seed: int,
    model: str,
    own: Mapping[str, Any],
    places: Mapping[str, str] | None = None,
) -> StagedCell:
    # one thread: a study's speed comes from --jobs, and its scores do not depend on how many cores there are
    values = {"threads": 1, **grid.run, **own, "model": model, "task": task, "seed": seed}
    settings = RunSettings.parse(values)
    identity: Any = {"run": settings.model_dump(mode="json"), "tests": grid.tests, "test_rows": grid.test_rows}
    for path, meant in (places or {}).items():
        identity = _replaced(identity, path, meant)
    return StagedCell(grid.backbone, task, name, settings, json.dumps(identity, sort_keys=True))


def _replaced(value: Any, path: str, meant: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(one, path, meant) for key, one in value.items()}
    return meant if value == path else value
