"""What a study of composition runs: a head, a LoRA per source and one for all, then every way to put them together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field, PositiveInt

from lamella.errors import LamellaError
from lamella.lab.runs.settings import RunSettings, override, read_recipe
from lamella.lab.schema import Settings, unknown_key
from lamella.lab.studies.grid import Cell
from lamella.lab.studies.rows import StudyFolder

HEAD, JOINT = "no LoRA", "joint LoRA"
ACCURACY, LOSS = "accuracy", "loss"
Answers = Literal["classes", "options", "tokens"]
TestRows = PositiveInt | dict[str, PositiveInt] | None
METRIC = {"classes": ACCURACY, "options": ACCURACY, "tokens": LOSS}
_MASKABLE = ("mole", "uniform")


class CompositionGrid(Settings):
    """A study of composition as its recipe says it.

    Where classes are asked for, a head is trained once per seed, with the backbone frozen, on the training rows of all
    sources, and is frozen from then on: all LoRAs and all arms share it, and differ in their deltas alone. A language
    model, which is asked for options or tokens, needs no head.
    """

    backbone: str
    answers: Answers = Field(
        "classes",
        description="what tests ask for: the class of a text, the likeliest of a task's answers, or a text's tokens, "
        "scored by their loss",
    )
    sources: dict[str, str] = Field(min_length=2, description="the task that each LoRA learns, by a name for it")
    held_out: dict[str, str] = Field(description="tasks that no LoRA learns, by a name for them")
    seeds: list[int] | int = Field(3, description="a list, or how many: 0, 1, ...")
    lora: dict[str, Any] = Field(
        description="settings of LoRA, and of the runs that train the sources' and the joint one"
    )
    head: dict[str, Any] = Field(default_factory=dict, description="settings of the run that trains the head")
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="by the name that tables show: 'method', 'sources' if it composes not all, and settings of its run",
    )
    masked: list[str] = Field(
        default_factory=list, description="arms that answer again without each of their LoRAs in turn: mole, uniform"
    )
    fitted_on: str | None = Field(
        None, description="the held-out task whose training rows arms are fitted on; else the sources' validation rows"
    )
    rows: int = Field(256, gt=0, description="that arms are fitted on, unseen by LoRAs")
    test_rows: TestRows = Field(None, description="of each source and held-out task, or by their names; all if absent")
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
    def metric(self) -> str:
        """What tests are scored by."""
        return METRIC[self.answers]

    @property
    def union(self) -> str:
        """The task of all sources together."""
        return f"mix:{'+'.join(self.sources.values())}"

    @property
    def fitting(self) -> str:
        """The task that arms are fitted on."""
        return f"held:{self.union}" if self.fitted_on is None else self.held_out[self.fitted_on]

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
        loras: where the LoRAs of this cell's seed lie, by source.
        masked: whether its model answers without each of its LoRAs too.
    """

    identity: str = ""
    loras: Mapping[str, str] = field(default_factory=dict)
    masked: bool = False

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
    if grid.fitted_on is not None and grid.fitted_on not in grid.held_out:
        raise LamellaError(
            unknown_key(grid.fitted_on, grid.held_out).replace("setting", "held-out task for 'fitted_on'", 1)
        )
    if isinstance(grid.test_rows, dict) and grid.test_rows.keys() != grid.tests.keys():
        raise LamellaError(f"test_rows by name must name every source and held-out task: {', '.join(grid.tests)}.")
    if lacking := [name for name, own in grid.arms.items() if not isinstance(own.get("method"), str | dict)]:
        raise LamellaError(f"arms.{lacking[0]} says not which method it is. Add a line 'method: uniform', for example.")
    _check_settings(grid)
    _check_masked(grid)
    if len(set(grid.names) | set(grid.tests)) < len(grid.names) + len(grid.sources) + len(grid.held_out):
        raise LamellaError(
            "Arms, sources and held-out tasks need different names, other than those of the LoRAs alone."
        )
    return grid


def _check_settings(grid: CompositionGrid) -> None:
    places = {"run.": grid.run, "lora.": grid.lora, "head.": grid.head}
    places |= {f"arms.{name}.": own for name, own in grid.arms.items()}
    for place, own in places.items():
        if given := [key for key in ("model", "task", "seed") if key in own]:
            raise LamellaError(f"{place}{given[0]} follows from the study's backbone, sources and seeds. Leave it out.")
    for name, own in grid.arms.items():
        chosen = own.get("sources", list(grid.sources))
        if not isinstance(chosen, list) or not chosen:
            raise LamellaError(f"arms.{name}.sources={chosen} must be a list of the study's sources, for example [a].")
        if unknown := [source for source in chosen if source not in grid.sources]:
            raise LamellaError(unknown_key(str(unknown[0]), grid.sources).replace("setting", "source", 1))


def _check_masked(grid: CompositionGrid) -> None:
    for name in grid.masked:
        if name not in grid.arms:
            raise LamellaError(unknown_key(name, grid.arms).replace("setting", "arm for 'masked'", 1))
        if _method(grid.arms[name])["name"] not in _MASKABLE or len(chosen_sources(grid, name)) < 2:
            raise LamellaError(
                f"masked names the arm {name}, but LoRAs can be left out only of an arm of {' or '.join(_MASKABLE)} "
                "with at least two of them."
            )


def chosen_sources(grid: CompositionGrid, arm: str) -> list[str]:
    """The sources whose LoRAs an arm composes."""
    return list(grid.arms[arm].get("sources", grid.sources))


def _method(own: Mapping[str, Any]) -> dict[str, Any]:
    stated = own["method"]
    return {"name": stated} if isinstance(stated, str) else dict(stated)


def stages_of(grid: CompositionGrid, folder: StudyFolder) -> Stages:
    """Every cell, seed by seed.

    Raises:
        LamellaError: settings do not fit.
    """
    heads, loras, arms = [], [], []
    for seed in grid.seed_list:
        head, of_base, base = _head(grid, seed, folder)
        lora = {**grid.lora, "method": {"name": "lora-only", **grid.lora.get("method", {})}}
        own = {name: _cell(grid, alone(name), task, seed, of_base, lora, base) for name, task in grid.sources.items()}
        joint = _cell(grid, JOINT, grid.union, seed, of_base, lora, base)
        adapters = {name: str(folder.run(cell.key)) for name, cell in own.items()}
        places = {**base, **{adapters[name]: f"lora:{cell.key}" for name, cell in own.items()}}
        composed = [_arm(grid, name, seed, of_base, adapters, places) for name in grid.arms]
        heads.append(replace(head, loras=adapters))
        loras += [replace(cell, loras=adapters) for cell in (*own.values(), joint)]
        arms += [replace(cell, loras=adapters, masked=cell.method in grid.masked) for cell in composed]
    return Stages(heads, loras, arms)


def _head(grid: CompositionGrid, seed: int, folder: StudyFolder) -> tuple[StagedCell, str, dict[str, str]]:
    """The cell without a LoRA, the model that LoRAs are trained on, and what stands for its place in keys."""
    if grid.answers == "classes":
        head = _cell(grid, HEAD, grid.union, seed, grid.backbone, {"method": "head", **grid.head})
        of_base = base_folder(folder, head)
        return head, of_base, {of_base: f"head:{head.key}"}
    return _cell(grid, HEAD, grid.union, seed, grid.backbone, {"method": "bare", **grid.head}), grid.backbone, {}


def _arm(
    grid: CompositionGrid, name: str, seed: int, model: str, adapters: Mapping[str, str], places: Mapping[str, str]
) -> StagedCell:
    own = {key: value for key, value in grid.arms[name].items() if key != "sources"}
    method = {**_method(own), "adapters": {source: adapters[source] for source in chosen_sources(grid, name)}}
    values = {"limit": {"train": grid.rows}, **own, "method": method}
    return _cell(grid, name, grid.fitting, seed, model, values, places)


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
