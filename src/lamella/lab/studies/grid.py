"""What a study trains: a recipe of backbones, tasks, seeds and methods becomes cells, each with its own settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from pydantic import Field

from lamella.errors import LamellaError
from lamella.lab.methods import Lora, Method, Mola
from lamella.lab.runs.settings import RunSettings, override, read_recipe
from lamella.lab.schema import Settings, unknown_key
from lamella.tuners.mola.allocation import SHAPES

# what decides how many tokens a run trains on
_COMPUTE = (
    "epochs",
    "max_steps",
    "batch_size",
    "accumulation",
    "max_length",
    "limit",
    "packing",
)


class Grid(Settings):
    """A study as its recipe says it."""

    backbones: list[str] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    seeds: list[int] | int = Field(3, description="a list, or how many: 0, 1, ...")
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1, description="by the name that tables show: 'method', and any setting of a run that is its own"
    )
    run: dict[str, Any] = Field(default_factory=dict, description="settings of every run")
    budget: Literal["equal-parameters", "equal-compute", "none"] = "none"
    match: str | None = Field(None, description="equal-parameters: the method whose size the others get")
    reference: str | None = Field(None, description="the method that the others are compared with; the first if absent")

    @property
    def seed_list(self) -> list[int]:
        """The seeds, one by one."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    @property
    def reference_name(self) -> str:
        """The method that the others are compared with."""
        return self.reference or next(iter(self.methods))


@dataclass(frozen=True)
class Cell:
    """One run of a study: a backbone, a task, a method by its name in the recipe, and a seed."""

    backbone: str
    task: str
    method: str
    settings: RunSettings

    @property
    def seed(self) -> int:
        """The seed, which also orders the training rows: the same for every method."""
        return self.settings.seed

    @property
    def key(self) -> str:
        """Names the settings, whatever the method is called: 16 hexadecimal digits of their SHA-256."""
        text = json.dumps(self.settings.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.method} on {self.task} with {self.backbone}, seed {self.seed}"


def read_grid(recipe: str, overrides: Iterable[str] = ()) -> Grid:
    """The study of a recipe, a file or a packaged one, with ``key=value`` changes.

    Raises:
        LamellaError: there is no such recipe, it is no study, or a key or value does not fit.
    """
    tree = read_recipe(recipe)
    if "methods" not in tree and "model" in tree:
        raise LamellaError(f"The recipe '{recipe}' is one run. Give it to `lamella train`; a study has 'methods'.")
    override(tree, overrides)
    grid = Grid.parse(tree)
    _check(grid)
    return grid


def cells_of(grid: Grid) -> list[Cell]:
    """Every cell, seed by seed, so that an early look already compares.

    Raises:
        LamellaError: settings of a method do not fit, or do not fit the budget.
    """
    methods = _budgeted(grid)
    return [
        Cell(backbone, task, name, _settings(grid, name, backbone, task, seed, methods[name]))
        for seed, backbone, task, name in product(grid.seed_list, grid.backbones, grid.tasks, methods)
    ]


def _settings(grid: Grid, name: str, backbone: str, task: str, seed: int, method: Method) -> RunSettings:
    own = {key: value for key, value in grid.methods[name].items() if key != "method"}
    # one thread: a study's speed comes from --jobs, and its scores do not depend on how many cores there are
    values = {"threads": 1} | grid.run | own
    return RunSettings.parse(values | {"model": backbone, "task": task, "seed": seed, "method": method})


def _check(grid: Grid) -> None:
    if not grid.seed_list or len(set(grid.seed_list)) < len(grid.seed_list):
        raise LamellaError(f"seeds={grid.seeds} must name at least one seed, and each of them once.")
    for key in ("match", "reference"):
        name = getattr(grid, key)
        if name is not None and name not in grid.methods:
            raise LamellaError(unknown_key(name, grid.methods, "").replace("setting", f"method for '{key}'", 1))
    known = [key for key in RunSettings.model_fields if key not in ("model", "task", "seed")]
    for place, values in {"run.": grid.run, **{f"methods.{name}.": own for name, own in grid.methods.items()}}.items():
        if unknown := [key for key in values if key not in known]:
            raise LamellaError(unknown_key(unknown[0], known, place))
    if "method" in grid.run:
        raise LamellaError("run.method would give every method of the study the same one. Set it under 'methods'.")
    if lacking := [name for name, own in grid.methods.items() if "method" not in own]:
        raise LamellaError(f"methods.{lacking[0]} says not which method it is. Add a line 'method: lora', for example.")
    if (grid.budget == "equal-parameters") != (grid.match is not None):
        raise LamellaError("'budget: equal-parameters' and 'match' belong together: match names whose size counts.")
    if grid.budget != "none":
        _check_compute(grid)


def _check_compute(grid: Grid) -> None:
    for name, own in grid.methods.items():
        if differing := [key for key in _COMPUTE if key in own]:
            raise LamellaError(
                f"methods.{name}.{differing[0]} would train it on other tokens than the rest, and 'budget: "
                f"{grid.budget}' trains all on the same. Set {differing[0]} under 'run', or 'budget: none'."
            )


def _budgeted(grid: Grid) -> dict[str, Method]:
    """The methods; with equal parameters, MoLA's shapes get one mean of experts, and LoRA's rank is matched."""
    methods = {name: RunSettings.parse({"method": own["method"]}).method for name, own in grid.methods.items()}
    if grid.match is None:
        return methods
    mean = _mean_experts(methods[grid.match])
    methods = {name: _with_mean(name, method, mean) for name, method in methods.items()}
    matched = methods[grid.match]
    return {name: _with_rank(method, matched) if name != grid.match else method for name, method in methods.items()}


def _mean_experts(method: Method) -> float | None:
    if not isinstance(method, Mola) or not isinstance(method.num_experts, str):
        return None
    if method.expert_budget is not None:
        return method.expert_budget
    groups = SHAPES.get(method.num_experts) or tuple(int(part) for part in method.num_experts.split("-"))
    return sum(groups) / len(groups)


def _with_mean(name: str, method: Method, mean: float | None) -> Method:
    if mean is None or not isinstance(method, Mola) or not isinstance(method.num_experts, str):
        return method
    if method.expert_budget not in (None, mean):
        raise LamellaError(
            f"methods.{name} has expert_budget={method.expert_budget:g}, and the method it must equal in size has "
            f"{mean:g} experts per layer in the mean. Leave expert_budget away, or set 'budget: none'."
        )
    return method.model_copy(update={"expert_budget": mean})


def _with_rank(method: Method, matched: Method) -> Method:
    if isinstance(method, Lora) and method.match is None and not isinstance(matched, Lora):
        return method.model_copy(update={"match": matched})
    return method


def settings_by_method(cells: Iterable[Cell]) -> Mapping[str, dict[str, Any]]:
    """What each method's runs were given, without what differs between the cells of a method."""
    seen: dict[str, dict[str, Any]] = {}
    for cell in cells:
        seen.setdefault(cell.method, cell.settings.model_dump(mode="json", exclude={"seed", "model", "task"}))
    return seen
