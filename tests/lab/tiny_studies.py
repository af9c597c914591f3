"""A study of a tiny model on a tiny task, of some seconds."""

from collections.abc import Sequence
from pathlib import Path

import yaml

RUN = {"batch_size": 8, "max_steps": 4, "max_length": 32, "lr": 5e-3, "log_every": 2, "evaluate_every": 2}


def write_study(path: Path, model: str, task: str, seeds: Sequence[int] = (0, 1), **run: object) -> str:
    study = {
        "backbones": [model],
        "tasks": [task],
        "seeds": list(seeds),
        "budget": "equal-parameters",
        "match": "MoLA",
        "reference": "LoRA",
        "run": RUN | run,
        "methods": {
            "MoLA": {"method": {"name": "mola", "r": 2, "num_experts": 2}},
            "LoRA": {"method": "lora"},
            "again": {"method": {"name": "lora"}},
            "head": {"method": "head"},
        },
    }
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return str(path)
