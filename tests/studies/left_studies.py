"""Folders as `lamella compare` leaves them, without training: scores of made-up predictions."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from lamella import __version__
from lamella.lab.studies.grid import Grid
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.results import examples_frame, results_frame

EXAMPLES = 200
STUDY = {
    "backbones": ["minilm"],
    "tasks": ["trec"],
    "seeds": 3,
    "reference": "LoRA",
    "methods": {
        "LoRA": {"method": "lora"},
        "wide": {"method": {"name": "mola", "num_experts": "rectangle"}},
        "tall": {"method": {"name": "mola", "num_experts": "triangle"}},
    },
}
MACHINE = {
    "processor": "a processor",
    "accelerators": [],
    "packages": {"torch": "2", "transformers": "5", "peft": "0"},
}


def write_recipe(path: Path, **changes: object) -> Grid:
    asked = "# Are more experts better?\n#\n# Second paragraph.\n"
    path.write_text(asked + yaml.safe_dump(STUDY | changes, sort_keys=False))
    study = read_study(str(path))
    assert isinstance(study, Grid)
    return study


def leave_study(folder: Path, grid: Grid, right: Mapping[str, float], more: Mapping[str, object] | None = None) -> None:
    """The folder of a study whose methods answer that share of the test rows; those not named did not run.

    ``more`` is what else their rows say.
    """
    rows, examples = [], []
    for cell in grid.cells():
        place = {"backbone": cell.backbone, "task": cell.task, "method": cell.method, "seed": cell.seed}
        place |= {"split": "test", "metric": "accuracy", "greater_is_better": True}
        place |= {"floor_linear": 0.5, "floor_majority": 0.25, "status": "not run", "key": cell.key}
        if cell.method in right:
            correct = np.random.default_rng(cell.seed).permutation(EXAMPLES) < right[cell.method] * EXAMPLES
            run = folder / "runs" / cell.key
            run.mkdir(parents=True, exist_ok=True)
            (run / "environment.json").write_text(json.dumps(MACHINE))
            examples.append(place | {"scores": correct})
            place |= {"status": "done", "value": float(correct.mean()), "trainable_parameters": 1000, **(more or {})}
        rows += [place, place | {"split": "validation", "value": 0.0}, place | {"metric": "macro_f1", "value": 0.0}]
    folder.mkdir(exist_ok=True)
    results_frame(rows, folder.name).to_parquet(folder / "results.parquet", index=False)
    examples_frame(examples, folder.name).to_parquet(folder / "examples.parquet", index=False)
    costs = [
        {"method": name, "backbone": "minilm", "step time": 2.0, "kept MB": 3.0} | {"latency ms, batch 1": 5.0}
        for name in right
    ]
    pd.DataFrame(costs).to_parquet(folder / "costs.parquet", index=False)
    recipe = {"lamella_version": __version__} | grid.model_dump(mode="json")
    (folder / "study.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
