"""A fair search: as many settings tried for every method, chosen on validation; its cells run with the best of each."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, field_validator
from scipy.stats import qmc

from lamella.errors import LamellaError
from lamella.files import read_json, write_atomic
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.run import train
from lamella.lab.runs.settings import RunSettings, changed
from lamella.lab.runs.tasks import task_of
from lamella.lab.schema import Settings
from lamella.lab.scoring import selection
from lamella.lab.studies.cells import Cell
from lamella.progress import working

if TYPE_CHECKING:
    from lamella.lab.studies.folder import StudyFolder

SHARES = (0.25, 0.5, 1.0)  # of a run's steps that a try is trained for, round by round; half of them go on
HALVED = 8  # tries from which on halving leaves two of them to be told apart by whole runs
SCALING, ALPHA = "scaling", "method.lora_alpha"
_DRAWN = 4  # settings tried before the next ones are chosen by what the earlier ones scored


class Range(Settings):
    """Positive numbers from ``low`` to ``high``, alike on a logarithmic scale."""

    low: float = Field(gt=0.0, description="the least")
    high: float = Field(gt=0.0, description="the most")


class Searched(Settings):
    """The section ``search`` of a recipe.

    Attributes:
        space: a range or a list of values by setting, ``lr`` or, below ``method``, ``router_aux_loss_coef``; a method
            that lacks one is searched in the others. ``scaling`` is lora_alpha / r, whatever the rank.
        tries: settings tried for each method, on each backbone and task.
        seed: of the tries, which the study's own seeds leave out.
    """

    space: dict[str, Range | list[Any]] = Field(min_length=1)
    tries: int = Field(8, gt=1)
    seed: int = Field(10, ge=0)

    @field_validator("space", mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """Settings of a method may be written below ``method``, as elsewhere in a recipe."""
        if not isinstance(value, dict) or not isinstance(below := value.get("method"), dict):
            return value
        flat = {key: one for key, one in value.items() if key != "method"}
        return flat | {f"method.{key}": one for key, one in below.items()}


@dataclass(frozen=True)
class Search:
    """The job of finding settings for a method on a task: those that score best on validation rows.

    Eight tries or more by successive halving (Jamieson and Talwalkar, Non-stochastic Best Arm Identification and
    Hyperparameter Optimization, AISTATS 2016): all train for a quarter of a run, the better half for half of one, the
    better half of these for a whole one. Fewer train for a whole one each: quarters of runs, which high learning rates
    win, would decide alone. A try that ends in an error counts as the worst. The first settings are spread over the
    space, the others drawn by Optuna's TPE.

    Attributes:
        cell: what is searched for, with the seed of the tries.
        space: what is tried, by setting.
        tries: how many.
    """

    cell: Cell
    space: Mapping[str, Range | Sequence[Any]]
    tries: int

    @property
    def key(self) -> str:
        """Names what is searched, where and how often."""
        space = {name: [one.low, one.high] if isinstance(one, Range) else list(one) for name, one in self.space.items()}
        identity = json.dumps({"cell": self.cell.key, "space": space, "tries": self.tries}, sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """For people."""
        cell = self.cell
        return f"search for {cell.method} on {cell.part or cell.task} with {cell.backbone}, {self.tries} tries"

    @property
    def needs(self) -> Sequence[str]:
        """What its cells are made from."""
        return self.cell.needs

    @property
    def rounds(self) -> Iterator[tuple[float, int]]:
        """The share of a run that each round trains for, and how many tries are in it."""
        for at, share in enumerate(SHARES if self.tries >= HALVED else SHARES[-1:]):
            yield share, self.tries >> at

    @property
    def runs(self) -> float:
        """How many whole runs its tries train for."""
        return sum(share * count for share, count in self.rounds)

    def carry_out(self, folder: StudyFolder) -> dict[str, Any]:
        """Try what was not tried yet; the row has every try and ``chosen``, the values of the best.

        Raises:
            LamellaError: no try came to a score, or Optuna is not installed.
        """
        self.cell.check()
        place, settings = folder.tries(self.key), folder.placed(self.cell.settings)
        kept = place / "tries.json"
        tried: list[dict[str, Any]] = read_json(kept)["tries"] if kept.is_file() else []
        higher = selection(task_of(settings)).greater_is_better
        best: list[dict[str, Any]] = []
        for share, count in self.rounds:
            going_on = [one["values"] for one in best]
            for number in range(count):
                here = [one for one in tried if one["share"] == share]
                if number < len(here):
                    continue  # tried before an interruption
                values = going_on[number] if going_on else _drawn(self.space, here, higher, settings.seed)
                run = place / f"{share:g}-{number}"
                with working(f"try {number + 1} of {count}, for {share:g} of a run"):
                    tried.append({"share": share, "values": values} | _try(settings, values, share, run))
                write_atomic(kept, json.dumps({"tries": tried}))
                shutil.rmtree(run, ignore_errors=True)
            best = _ranked([one for one in tried if one["share"] == share], higher)
        if "failed" in best[0]:
            raise LamellaError(f"No try of the {self.label} came to a score. The last one: {best[0]['failed']}")
        return {
            "chosen": best[0]["values"],
            "tries": tried,
            "metrics": {"train_seconds": sum(one["seconds"] for one in tried)},
        }


def search_of(cell: Cell, given: Searched) -> Search | None:
    """The search for a cell's settings, the same for all seeds; None where it has nothing that is searched."""
    settings = changed(cell.settings, {"seed": given.seed})
    space = {key: one for key, one in given.space.items() if has(settings, key)}
    return Search(replace(cell, settings=settings), space, given.tries) if space else None


def check_search(
    search: Searched,
    seeds: Sequence[int],
    cells: Sequence[Cell],
    run: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
) -> None:
    """Refuses a search that chooses nothing, or what is given too.

    Args:
        search: of the study.
        seeds: the study's own.
        cells: those that are searched for, of one seed.
        run: settings that the recipe gives to every run.
        methods: what it gives to each.

    Raises:
        LamellaError: its seed is one of the study's, none of the cells has a setting, one is given beside it, or a
            value is none that the setting takes.
    """
    if search.seed in seeds:
        raise LamellaError(
            f"search.seed={search.seed} is one of the study's seeds, whose runs are to be new to what was chosen. Give "
            "another one."
        )
    given = {"run": run} | {f"methods.{name}": one for name, one in methods.items()}
    for key, values in search.space.items():
        having = [cell.settings for cell in cells if has(cell.settings, key)]
        if not having:
            raise LamellaError(f"search.space.{key} is a setting of none of the methods: {', '.join(methods)}.")
        chosen = ALPHA if key == SCALING else key
        for place, one in given.items():
            method = one.get("method")
            if chosen in one or (isinstance(method, dict) and chosen.startswith("method.") and chosen[7:] in method):
                raise LamellaError(
                    f"{place} gives {chosen}, which search.space.{key} chooses too. Leave one of them out."
                )
        for value in [values.low, values.high] if isinstance(values, Range) else values:
            for settings in having:
                with_values(settings, {key: value})


def search_note(search: Searched, cells: Sequence[Cell], folder: StudyFolder) -> str | None:
    """What was chosen for each method, out of how many tries, and how long that took; None where nothing was yet."""
    chosen: dict[str, str] = {}
    for cell in cells:
        if cell.search is not None and (row := folder.row(cell.search.key)) is not None:
            values = ", ".join(f"{key} {shown(value)}" for key, value in row["chosen"].items())
            failed = sum("failed" in one for one in row["tries"])
            errors = f", {failed} tries ended in an error" if failed else ""
            name = f"{cell.method} on {cell.part}" if cell.part else cell.method
            chosen[name] = f"{name} {values} ({row['seconds']:.0f} s{errors})"
    if not chosen:
        return None
    how = "the better half of them trained twice as long, twice" if search.tries >= HALVED else "each a whole run"
    return (
        f"settings were searched alike: {search.tries} tries for each method, seed {search.seed}, {how}; the best on "
        f"validation rows: {'; '.join(chosen.values())}."
    )


def has(settings: RunSettings, key: str) -> bool:
    """Whether a run's settings, if it trains anything, or those of its method have a key that can be searched."""
    if key == SCALING:
        return has(settings, ALPHA) and getattr(settings.method, "r", None) is not None
    first, _, of_method = key.partition(".")
    if first == "method":
        return of_method in type(settings.method).model_fields
    return settings.method.trains and key in RunSettings.model_fields and key not in ("model", "task", "seed")


def with_values(settings: RunSettings, values: Mapping[str, Any]) -> RunSettings:
    """Settings with what a search has drawn."""
    given = {key: value for key, value in values.items() if key != SCALING}
    if SCALING in values:
        given[ALPHA] = values[SCALING] * vars(settings.method)["r"]
    return changed(settings, given)


def shown(value: Any) -> str:
    """A chosen value in words."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _try(settings: RunSettings, values: Mapping[str, Any], share: float, path: Path) -> dict[str, Any]:
    """The score on validation rows after a share of a run, or why there is none; and the seconds it trained for."""
    given, run = changed(with_values(settings, values), _length(settings, share)), RunFolder(path)
    try:
        metrics = run.metrics() if run.finished else train(given, path, score_test=False).metrics
    except LamellaError as error:
        return {"failed": str(error), "seconds": 0.0}
    return {"validation": metrics["validation"][metrics["metric"]], "seconds": metrics["train_seconds"]}


def _length(settings: RunSettings, share: float) -> dict[str, Any]:
    """What makes a run a share of its length; its schedule, and when it is scored, shrink along."""
    if settings.max_steps is not None:
        return {"max_steps": max(1, round(share * settings.max_steps)), "evaluate_every": None}
    return {"epochs": share * (settings.epochs or 1.0), "evaluate_every": None}


def _ranked(tried: Sequence[dict[str, Any]], higher: bool) -> list[dict[str, Any]]:
    """The best first, those without a score last."""
    sign = -1 if higher else 1
    return sorted(tried, key=lambda one: ("failed" in one, sign * one.get("validation", 0.0)))


def _drawn(
    space: Mapping[str, Range | Sequence[Any]], tried: Sequence[Mapping[str, Any]], higher: bool, seed: int
) -> dict[str, Any]:
    """The next values to try, from those tried so far alone: an interrupted search goes on as it would have.

    The first ones are spread evenly over the space, which independent draws of so few are not.
    """
    optuna = _optuna()
    if len(tried) < _DRAWN:
        even = qmc.Halton(len(space), scramble=False).random(len(tried) + 1)[-1]
        shares = (even + np.random.default_rng(seed).random(len(space))) % 1.0
        return {key: _at(one, float(share)) for (key, one), share in zip(space.items(), shares, strict=True)}
    distributions = {key: _distribution(optuna, one) for key, one in space.items()}
    sampler = optuna.samplers.TPESampler(seed=1000 * seed + len(tried), n_startup_trials=_DRAWN)
    study = optuna.create_study(direction="maximize" if higher else "minimize", sampler=sampler)
    for one in tried:
        if "validation" in one:
            params = {
                key: value if isinstance(space[key], Range) else list(space[key]).index(value)
                for key, value in one["values"].items()
            }
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=distributions, value=one["validation"])
            )
    asked = study.ask(distributions).params
    return {key: asked[key] if isinstance(one, Range) else one[asked[key]] for key, one in space.items()}


def _at(values: Range | Sequence[Any], share: float) -> Any:
    """The value at a share from 0 to 1 of what is tried, on a logarithmic scale where it is a range."""
    if isinstance(values, Range):
        return values.low * (values.high / values.low) ** share
    return values[int(share * len(values))]


def _distribution(optuna: Any, values: Range | Sequence[Any]) -> Any:
    if isinstance(values, Range):
        return optuna.distributions.FloatDistribution(values.low, values.high, log=True)
    return optuna.distributions.CategoricalDistribution(range(len(values)))


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise LamellaError("A search draws its tries with optuna: pip install 'lamella[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
