"""What studies left behind, small enough to be committed: their rows, and the test score of every example.

A kept study is ``NAME.parquet`` (the rows of `lamella compare`), ``NAME.examples.parquet`` (the scores that paired
intervals resample) and ``NAME.yaml`` (what was run, and on what); NAME is the recipe that plans it. Further tables of
the study lie beside them under its name, and ``NAME.noise.parquet`` where noise was measured (by `lamella evaluate
--noise` with -o in the folder ``noise`` of the study).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lamella.errors import LamellaError
from lamella.files import atomic, write_atomic
from lamella.lab.methods import Method, read_saved
from lamella.lab.runs.settings import read_recipe, recipe_names
from lamella.lab.studies.continual import Continual
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.recipe import StudyRecipe, read_study, study_of
from lamella.lab.studies.results import Results, results_of
from lamella.statistics import Contrast, contrast
from studies import depth

RECIPES = Path(__file__).parent / "recipes"
ROWS = Path(__file__).parent / "rows"
_OPTIONAL = ("interference", "masked", "costs", "noise", "stages", "depth")


def study_names() -> list[str]:
    """The project's studies, and the packaged recipes that are studies."""
    packaged = [name for name in recipe_names() if {"methods", "sources"} & set(read_recipe(name))]
    return [*packaged, *sorted(path.stem for path in RECIPES.glob("*.yaml"))]


def study_recipe(name: str) -> StudyRecipe:
    """The recipe of a study by its name."""
    path = RECIPES / f"{name}.yaml"
    return read_study(str(path) if path.is_file() else name)


def purpose(name: str) -> str:
    """The comment that a study's recipe begins with, as Markdown; its first paragraph says what is asked."""
    own = RECIPES / f"{name}.yaml"
    text = (own if own.is_file() else files("lamella.lab") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    comment = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in comment)


def keep(folder: Path, into: Path = ROWS) -> str:
    """Copy the finished cells of a study's folder, which is named as its recipe, into the folder of kept ones.

    Returns:
        The study's name.

    Raises:
        LamellaError: the folder holds no summarised study, or one that is not what the recipe of its name plans.
    """
    name, study = folder.name, StudyFolder(folder)
    if name not in study_names():
        known = ", ".join(study_names())
        raise LamellaError(f"'{name}' is not a study here. The folder of a study to keep bears its name: {known}.")
    if not (folder / "results.parquet").is_file():
        raise LamellaError(f"{folder} has no results.parquet. Finish it first: lamella compare {name} -o {folder}.")
    written = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
    recipe = study_of(read_saved(written))
    _check_planned(name, recipe)
    tables = {path.stem: pd.read_parquet(path) for path in folder.glob("*.parquet")}
    rows = tables["results"][tables["results"]["status"] == "done"]
    machines = sorted({_machine_of(study.run(key)) for key in set(rows["key"])})
    write_atomic(into / f"{name}.yaml", yaml.safe_dump({"study": written, "machines": machines}, sort_keys=False))
    _write(into / f"{name}.parquet", rows)
    _write(into / f"{name}.examples.parquet", _shown_examples(recipe, tables["examples"]))
    tables["noise"] = _noise(folder, rows)
    tables["depth"] = depth.measured(_reference_runs(study, recipe, rows))
    for kind in _OPTIONAL:
        _write(into / f"{name}.{kind}.parquet", tables.get(kind, pd.DataFrame()))
    return name


def _shown_examples(recipe: StudyRecipe, examples: pd.DataFrame) -> pd.DataFrame:
    """Those that a table of the study is about; what is kept of a LoRA is resampled over all LoRAs together."""
    metrics = {(table.task, table.metric) for table in recipe.tables}
    shown = [
        (task, metric) in metrics or (task, None) in metrics
        for task, metric in zip(examples["task"], examples["metric"], strict=True)
    ]
    return examples[shown]


def _reference_runs(study: StudyFolder, recipe: StudyRecipe, rows: pd.DataFrame) -> dict[int, Path]:
    """By seed, the runs that others are compared with, where these are of MoLA."""
    kinds = {cell.method: cell.settings.method.name for cell in recipe.cells()}
    if kinds.get(recipe.reference_name) != "mola":
        return {}
    cells = rows[rows["method"] == recipe.reference_name].drop_duplicates("key")
    return {int(seed): study.run(key) for seed, key in zip(cells["seed"], cells["key"], strict=True)}


def _machine_of(run: Path) -> str:
    """What a run ran on, in words: device and versions."""
    machine = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    device = ", ".join(machine["accelerators"]) or machine["processor"]
    versions = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "transformers", "peft"))
    return f"{device}; {versions}"


def _noise(folder: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """The main metric of each cell under noise; no rows where nothing was scored so."""
    files = sorted(folder.glob("noise/*/robustness.parquet"))
    if not files:
        return pd.DataFrame()
    scored = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    place = ["backbone", "task", "method", "seed", "key", "metric"]
    examples = pd.read_parquet(folder / "examples.parquet", columns=place[:4] + place[5:])
    cells = rows[rows["split"] == "test"][place].merge(examples, on=place[:4] + place[5:])
    noisy = cells.merge(
        scored.rename(columns={"seed": "draw"}).drop(columns="method"),
        left_on=["key", "metric"],
        right_on=["run", "metric"],
    )
    return noisy[[*place[:4], "noise", "strength", "draw", "value"]]


def _write(path: Path, table: pd.DataFrame) -> None:
    if table.empty:
        path.unlink(missing_ok=True)
        return
    with atomic(path) as unfinished:
        table.to_parquet(unfinished, index=False, compression="zstd")


def _check_planned(name: str, ran: StudyRecipe) -> None:
    """A study may be part of what its recipe plans, with nothing changed."""
    plan = study_recipe(name)
    changed = []
    for key in type(plan).model_fields:
        was, now = getattr(ran, key), getattr(plan, key)
        if key == "seeds":
            changed += [key] if not set(ran.seed_list) <= set(plan.seed_list) else []
        elif key == "methods":
            changed += [f"{key}.{method}" for method, given in was.items() if now.get(method) != given]
        elif key in ("backbones", "tasks"):
            changed += [key] if not set(was) <= set(now) else []
        elif was != now:
            changed.append(key)
    if changed:
        raise LamellaError(
            f"The study {name} was run with other settings than its recipe now has: {changed[0]} differs. Run it again "
            f"and keep that: lamella compare {name}, then python -m studies --add runs/{name}."
        )


@dataclass(frozen=True)
class KeptStudy:
    """A study of the project with what is kept of it; nothing kept means nothing was run.

    Attributes:
        name: of its recipe.
        recipe: what is planned.
        machines: that its cells ran on, in words.
        tables: as kept, by kind: results, examples and what else there is.
    """

    name: str
    recipe: StudyRecipe
    machines: Sequence[str]
    tables: Mapping[str, pd.DataFrame]

    @cached_property
    def results(self) -> list[Results]:
        """A table for each backbone and task, or for each test; none where nothing was run."""
        if "results" not in self.tables:
            return []
        return results_of(self.recipe, self.tables["results"], self.tables["examples"])

    @cached_property
    def methods(self) -> dict[str, Method]:
        """Settings by the name that tables show, in the recipe's order."""
        return {cell.method: cell.settings.method for cell in reversed(self.recipe.cells())}

    @property
    def planned(self) -> int:
        """Number of cells that the recipe plans; the stages of a sequence are one."""
        if isinstance(self.recipe, Continual):
            return len(self.recipe.names) * len(self.recipe.runs)
        return len(self.recipe.cells())

    @property
    def run(self) -> int:
        """Number of cells that are kept."""
        if "results" not in self.tables:
            return 0
        first = self.recipe.tables[0]
        rows = self.tables["results"]
        # every test of a study of composition is of the same cells
        rows = rows if first.metric is None else rows[rows["task"] == first.task]
        return len(rows.drop_duplicates(["backbone", "task", "method", "seed"]))

    def named(self, kind: str) -> list[str]:
        """The names of the methods of one kind."""
        return [name for name in self.recipe.names if self.methods[name].name == kind]

    def costs(self, backbone: str) -> dict[str, dict[str, Any]]:
        """Measures by method, as `lamella.lab.studies.costs` gives them; empty where they were not taken."""
        rows = self.tables.get("costs", pd.DataFrame({"backbone": [], "method": []}))
        return {str(row["method"]): dict(row) for row in rows[rows["backbone"] == backbone].to_dict("records")}

    def losses(self, results: Results, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, float, Contrast]]:
        """What noise takes away: kind, strength, and the difference in how much worse the score gets.

        Seeds and draws of the noise are resampled; p-values are corrected over the pairs of one kind and strength.
        """
        if "noise" not in self.tables:
            return []
        noise = self.tables["noise"]
        noise = noise[(noise["backbone"] == results.backbone) & (noise["task"] == results.task)]
        sign = 1.0 if results.greater_is_better else -1.0
        differences = []
        for (kind, strength), rows in noise[noise["strength"] > 0].groupby(["noise", "strength"]):
            lost: dict[str, dict[int, Any]] = {}
            for (method, seed), values in rows.sort_values("draw").groupby(["method", "seed"])["value"]:
                lost.setdefault(method, {})[seed] = sign * (results.values[method][seed] - values.to_numpy())
            differences += [(kind, strength, one) for one in contrast(lost, pairs)]
        return differences


def load_study(name: str, folder: Path = ROWS) -> KeptStudy:
    """A study by its name, with what ``folder`` keeps of it.

    Raises:
        LamellaError: the recipe has changed since the study was run, or one of the three files is missing.
    """
    files = [folder / f"{name}{end}" for end in (".yaml", ".parquet", ".examples.parquet")]
    missing = [path.name for path in files if not path.is_file()]
    if len(missing) == len(files):
        return KeptStudy(name, study_recipe(name), [], {})
    if missing:
        raise LamellaError(f"{folder} lacks {missing[0]} of the study {name}. Keep it again: python -m studies --add.")
    record = yaml.safe_load(files[0].read_text(encoding="utf-8"))
    _check_planned(name, study_of(read_saved(record["study"])))
    tables = {"results": pd.read_parquet(files[1]), "examples": pd.read_parquet(files[2])}
    for kind in _OPTIONAL:
        if (path := folder / f"{name}.{kind}.parquet").is_file():
            tables[kind] = pd.read_parquet(path)
    return KeptStudy(name, study_recipe(name), record["machines"], tables)
