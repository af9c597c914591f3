"""What studies left behind, small enough to be committed: their rows, and the test score of every example.

A kept study is three files: ``NAME.parquet`` (the rows of `lamella compare`), ``NAME.examples.parquet`` (the scores
that paired intervals resample) and ``NAME.yaml`` (what was run, and on what); NAME is the packaged recipe that plans
it. Two more are there if they were measured: ``NAME.costs.parquet`` (by `lamella compare` at its end) and
``NAME.noise.parquet`` (by `lamella evaluate --noise` with -o in the folder ``noise`` of the study).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml

from lamella.errors import LamellaError
from lamella.files import whole, write_whole
from lamella.lab.methods import Method, read_saved
from lamella.lab.runs.settings import read_recipe, recipe_names
from lamella.lab.studies.examples import example_scores
from lamella.lab.studies.grid import Cell, Grid, cells_of, read_grid
from lamella.lab.studies.rows import StudyFolder
from lamella.statistics import Interval, holm, paired_interval

RESAMPLES = 2000
_PLACE = ["backbone", "task", "method", "seed"]
_NOISE = [*_PLACE, "noise", "strength", "draw", "value"]
Floats = npt.NDArray[np.float64]


def study_names() -> list[str]:
    """The packaged recipes that are studies of methods."""
    return [name for name in recipe_names() if "methods" in read_recipe(name)]


def keep(folder: Path, into: Path) -> str:
    """Copy the finished cells of a study's folder, which is named as its recipe, into the folder of kept ones.

    Returns:
        The study's name.

    Raises:
        LamellaError: the folder holds no summarised study, or one that is not what the recipe of its name plans.
    """
    name, study = folder.name, StudyFolder(folder)
    if name not in study_names():
        known = ", ".join(study_names())
        raise LamellaError(f"'{name}' is no packaged study. The folder of a study to keep bears its name: {known}.")
    if not (folder / "results.parquet").is_file():
        raise LamellaError(f"{folder} has no results.parquet. Finish it first: lamella compare {name} -o {folder}.")
    grid = Grid.parse(read_saved(yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))))
    _check_planned(name, grid)
    rows = pd.read_parquet(folder / "results.parquet")
    rows = rows[rows["status"] == "done"]
    cells = rows.drop_duplicates(_PLACE)
    metrics = [_metric(study, key) for key in cells["key"]]
    scores = [_scores(study, key, metric) for key, metric in zip(cells["key"], metrics, strict=True)]
    machines = sorted({machine_of(study.run(key)) for key in cells["key"]})
    record = {"study": grid.model_dump(mode="json"), "machines": machines}
    _write(into / f"{name}.examples.parquet", cells[_PLACE].assign(metric=metrics, scores=scores))
    _write(into / f"{name}.costs.parquet", _costs(folder))
    _write(into / f"{name}.noise.parquet", _noise(folder, cells.assign(metric=metrics)))
    _write(into / f"{name}.yaml", yaml.safe_dump(record, sort_keys=False))
    _write(into / f"{name}.parquet", rows.merge(_alphas(study, cells["key"]), on="key", how="left"))
    return name


def _alphas(study: StudyFolder, keys: Sequence[str]) -> pd.DataFrame:
    """Where MoLEx's learned alphas began and ended, means over what has one; no rows where none was learned."""
    found = []
    for key in keys:
        alpha = (study.row(key) or {"metrics": {}})["metrics"].get("alpha")
        if alpha is not None:
            ends = {f"alpha_{when}": float(np.mean(list(values.values()))) for when, values in alpha.items()}
            found.append({"key": key, **ends})
    return pd.DataFrame(found, columns=["key", "alpha_start", "alpha_end"])


def _metric(study: StudyFolder, key: str) -> str:
    row = study.row(key)
    if row is None:
        raise LamellaError(f"{study.path} has no row of the cell {key} that its results.parquet names. Compare again.")
    return str(row["metrics"]["metric"])


def _scores(study: StudyFolder, key: str, metric: str) -> Floats:
    """Scores of a run's test examples; where the metric is not their mean, its value alone."""
    found = example_scores(metric, [study.run(key)])
    if found is not None:
        return found[0].astype(np.float32)
    return np.array([(study.row(key) or {})["metrics"]["test"][metric]])


def machine_of(run: Path) -> str:
    """What a run ran on, in words: device and versions."""
    machine = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    device = ", ".join(machine["accelerators"]) or machine["processor"]
    versions = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "transformers", "peft"))
    return f"{device}; {versions}"


def _costs(folder: Path) -> pd.DataFrame:
    path = folder / "costs.parquet"
    return pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=["backbone", "method"])


def _noise(folder: Path, cells: pd.DataFrame) -> pd.DataFrame:
    """The main metric of each cell under noise; no rows where nothing was scored so."""
    files = sorted(folder.glob("noise/*/robustness.parquet"))
    if not files:
        return pd.DataFrame(columns=_NOISE)
    scored = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    found = cells[[*_PLACE, "key", "metric"]].merge(
        scored.rename(columns={"seed": "draw"}).drop(columns="method"),
        left_on=["key", "metric"],
        right_on=["run", "metric"],
    )
    return found[_NOISE]


def _write(path: Path, content: pd.DataFrame | str) -> None:
    if not len(content):
        path.unlink(missing_ok=True)
        return
    if isinstance(content, str):
        write_whole(path, content)
        return
    with whole(path) as unfinished:
        content.to_parquet(unfinished, index=False, compression="zstd")


def _check_planned(name: str, ran: Grid) -> None:
    """A study may be part of what its recipe plans, with nothing changed."""
    plan = read_grid(name)
    changed = [key for key in ("run", "budget", "match", "reference") if getattr(plan, key) != getattr(ran, key)]
    changed += [f"methods.{method}" for method, own in ran.methods.items() if plan.methods.get(method) != own]
    for key in ("backbones", "tasks", "seed_list"):
        changed += [key] if not set(getattr(ran, key)) <= set(getattr(plan, key)) else []
    if changed:
        raise LamellaError(
            f"The study {name} was run with other settings than its recipe now has: {changed[0]} differs. "
            f"Run it again and keep that: lamella compare {name}, then lamella evidence --add runs/{name}."
        )


@dataclass(frozen=True)
class Contrast:
    """``first`` minus ``second`` on the seeds that both have; ``p_value`` is Holm's, over the contrasts made together.

    ``seeds`` and ``examples`` count what is resampled; one example where the metric is no mean over them.
    """

    first: str
    second: str
    interval: Interval
    p_value: float
    seeds: int
    examples: int

    @property
    def told_apart(self) -> bool:
        """Whether the difference is significant at 0.05."""
        return self.p_value < 0.05


@dataclass(frozen=True)
class Standing:
    """The methods of a study on one backbone and task: what is planned, and what is kept of it.

    Attributes:
        methods: settings by the name that tables show, in the recipe's order.
        metric: the main one; None before anything was run. ``greater_is_better`` belongs to it.
        tests: its test value by method and seed.
        examples: the scores behind it, by method and seed.
        sizes: trainable parameters by method.
        costs: measures by method, as `lamella.lab.studies.costs` gives them; empty where they were not taken.
        floors: test value of the main metric by floor.
        noise: as kept, for this backbone and task.
        alphas: by method, each seed's learned alpha before and after training, a mean over what has one.
        entropies: of a composition's methods, each seed's entropy of the routers, in nats.
    """

    study: str
    backbone: str
    task: str
    methods: Mapping[str, Method]
    seeds: Sequence[int]
    reference: str
    metric: str | None
    greater_is_better: bool
    tests: Mapping[str, Mapping[int, float]]
    examples: Mapping[str, Mapping[int, Floats]]
    sizes: Mapping[str, int]
    costs: Mapping[str, Mapping[str, float]]
    floors: Mapping[str, float]
    noise: pd.DataFrame
    alphas: Mapping[str, Sequence[tuple[float, float]]]
    entropies: Mapping[str, Sequence[float]]

    @property
    def planned(self) -> int:
        """Number of cells that the recipe plans."""
        return len(self.methods) * len(self.seeds)

    @property
    def run(self) -> int:
        """Number of cells that are kept."""
        return sum(map(len, self.tests.values()))

    @cached_property
    def against_reference(self) -> list[Contrast]:
        """Every other method minus the reference."""
        return self.contrasts([(name, self.reference) for name in self.methods if name != self.reference])

    def contrasts(self, pairs: Sequence[tuple[str, str]]) -> list[Contrast]:
        """The paired differences of those pairs that share a seed; p-values are corrected over them."""
        return _corrected([one for pair in pairs if (one := _contrast(*pair, self.examples)) is not None])

    def losses(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, float, Contrast]]:
        """The same of what noise takes away: kind, strength, and the difference in how much worse the score gets.

        Seeds and draws of the noise are resampled; p-values are corrected over everything returned.
        """
        noisy = self.noise[self.noise["strength"] > 0]
        places = sorted(set(zip(noisy["noise"], noisy["strength"], strict=True)))
        found = [(place, _contrast(*pair, self._lost(*place))) for place in places for pair in pairs]
        made = [(place, one) for place, one in found if one is not None]
        corrected = _corrected([one for _, one in made])
        return [(kind, strength, one) for ((kind, strength), _), one in zip(made, corrected, strict=True)]

    def _lost(self, kind: str, strength: float) -> dict[str, dict[int, Floats]]:
        noisy = self.noise[(self.noise["noise"] == kind) & (self.noise["strength"] == strength)]
        sign = 1.0 if self.greater_is_better else -1.0
        lost: dict[str, dict[int, Floats]] = {}
        for (method, seed), values in noisy.sort_values("draw").groupby(["method", "seed"])["value"]:
            lost.setdefault(method, {})[seed] = sign * (self.tests[method][seed] - values.to_numpy())
        return lost


def _contrast(first: str, second: str, examples: Mapping[str, Mapping[int, Floats]]) -> Contrast | None:
    seeds = sorted(set(examples.get(first, {})) & set(examples.get(second, {})))
    if not seeds:
        return None
    a, b = (np.stack([examples[side][seed] for seed in seeds]) for side in (first, second))
    interval = paired_interval(a, b, resamples=RESAMPLES)
    return Contrast(first, second, interval, interval.p_value, *a.shape)


def _corrected(found: Sequence[Contrast]) -> list[Contrast]:
    p_values = holm([one.p_value for one in found])
    return [replace(one, p_value=p) for one, p in zip(found, p_values, strict=True)]


@dataclass(frozen=True)
class KeptStudy:
    """A packaged study with what is kept of it: a standing for each backbone and task, and the machines it ran on.

    ``remarks`` say what was measured besides scores; ``parts`` are tests whose union is a standing of its own.
    """

    name: str
    standings: list[Standing]
    machines: list[str]
    remarks: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def planned(self) -> int:
        """Number of cells that the recipe plans."""
        return sum(standing.planned for standing in self.standings)

    @property
    def run(self) -> int:
        """Number of cells that are kept."""
        return sum(standing.run for standing in self.standings)


def load_study(name: str, folder: Path) -> KeptStudy:
    """The study of a packaged recipe, with what ``folder`` keeps of it; nothing kept means nothing was run.

    Raises:
        LamellaError: the recipe has changed since the study was run, or one of the three files is missing.
    """
    grid, files = read_grid(name), [folder / f"{name}{end}" for end in (".parquet", ".examples.parquet", ".yaml")]
    missing = [path.name for path in files if not path.is_file()]
    if 0 < len(missing) < len(files):
        raise LamellaError(f"{folder} lacks {missing[0]} of the study {name}. Keep it again: lamella evidence --add.")
    machines: list[str] = []
    if not missing:
        record = read_saved(yaml.safe_load(files[2].read_text(encoding="utf-8")))
        _check_planned(name, Grid.parse(record["study"]))
        machines = record["machines"]
    tables = {kind: _table(folder / f"{name}{kind}.parquet") for kind in ("", ".examples", ".costs", ".noise")}
    places: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells_of(grid):
        places.setdefault((cell.backbone, cell.task), []).append(cell)
    return KeptStudy(name, [_standing(name, grid, cells, tables) for cells in places.values()], machines)


def _table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=[*_NOISE, "split", "metric", "scores"])


def _standing(name: str, grid: Grid, cells: Sequence[Cell], tables: Mapping[str, pd.DataFrame]) -> Standing:
    backbone, task = cells[0].backbone, cells[0].task
    here = {kind: table[table["backbone"] == backbone] for kind, table in tables.items()}
    rows, examples, noise = (here[kind][here[kind]["task"] == task] for kind in ("", ".examples", ".noise"))
    metric = examples["metric"].iloc[0] if len(examples) else None
    rows = rows[(rows["split"] == "test") & (rows["metric"] == metric)]
    tests: dict[str, dict[int, float]] = {method: {} for method in grid.methods}
    scores: dict[str, dict[int, Floats]] = {method: {} for method in grid.methods}
    alphas: dict[str, list[tuple[float, float]]] = {}
    for row in rows.itertuples():
        tests[row.method][row.seed] = row.value
        if not pd.isna(getattr(row, "alpha_end", np.nan)):
            alphas.setdefault(row.method, []).append((row.alpha_start, row.alpha_end))
    for one in examples.itertuples():
        scores[one.method][one.seed] = np.asarray(one.scores, np.float64)
    floors = {word: rows[f"floor_{word}"].iloc[0] for word in ("linear", "majority") if len(rows)}
    return Standing(
        study=name,
        backbone=backbone,
        task=task,
        methods={cell.method: cell.settings.method for cell in cells if cell.seed == grid.seed_list[0]},
        seeds=grid.seed_list,
        reference=grid.reference_name,
        metric=metric,
        greater_is_better=bool(rows["greater_is_better"].iloc[0]) if len(rows) else True,
        tests=tests,
        examples=scores,
        sizes={row.method: int(row.trainable_parameters) for row in rows.itertuples()},
        costs={cost["method"]: cost for cost in here[".costs"].to_dict("records")},
        floors={word: value for word, value in floors.items() if not pd.isna(value)},
        noise=noise,
        alphas=alphas,
        entropies={},
    )
