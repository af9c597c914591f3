"""A run on disk: what is in its folder, when it may be written, and how nothing in it is ever half there."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lamella.errors import LamellaError
from lamella.files import UNFINISHED, read_json, write_atomic
from lamella.lab.runs.settings import RunSettings, settings_of
from lamella.version import __version__

_OURS = (
    "run.yaml",
    "environment.json",
    "log.txt",
    "metrics.json",
    "predictions.parquet",
    "trace.parquet",
    "redundancy.parquet",
    "routing.parquet",
    "report.html",
    "adapter",
    "model",
    "checkpoints",
    "tracking",
)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. `metrics.json` is written last: a run that has it is finished."""

    path: Path

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "metrics.json").is_file()

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer keeps what a resumed run needs; gone when the run is finished."""
        return self.path / "checkpoints"

    def metrics(self) -> dict[str, Any]:
        """What a finished run measured."""
        return read_json(self.path / "metrics.json")

    def check(self, settings: RunSettings, *, force: bool = False) -> None:
        """Whether a run of these settings may be written here, anew or from where it was interrupted.

        Raises:
            LamellaError: the folder holds a finished run, a run of other settings, or something that is not a run.
        """
        there = [path.name for path in self.path.glob("*") if not path.name.startswith(UNFINISHED)]
        foreign = sorted(name for name in there if name not in _OURS)
        if foreign and not (self.path / "run.yaml").is_file():
            raise LamellaError(
                f"{self.path} holds no run, but {foreign[0]} lies in it. Choose another folder with -o; "
                "this one is left as it is."
            )
        if force:
            return
        if self.finished:
            raise LamellaError(
                f"{self.path} holds a finished run, which is never overwritten. Choose another folder with -o, "
                "or give --force to delete that run first."
            )
        if self.last_checkpoint() is not None:
            self.check_same(settings)

    def begin(self, settings: RunSettings, *, force: bool = False) -> None:
        """Write what was asked for and on which machine; with ``force``, delete the run that was here first."""
        if force:
            self._clear()
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_text("run.yaml", yaml.safe_dump(settings.written(), sort_keys=False))
        self.write_json("environment.json", environment())

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; incomplete ones, left by a kill while saving, are removed."""
        complete = []
        for folder in self.checkpoints.glob("checkpoint-*"):
            try:
                json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))  # the last file of a checkpoint
            except (FileNotFoundError, json.JSONDecodeError):
                shutil.rmtree(folder)
            else:
                complete.append(folder)
        return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)

    def remove_checkpoints(self) -> None:
        """Remove what only a resumed run would need."""
        if self.checkpoints.is_dir():
            shutil.rmtree(self.checkpoints)

    def write_text(self, name: str, text: str) -> None:
        """Write a file completely or not at all."""
        write_atomic(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file completely or not at all."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def check_same(self, settings: RunSettings) -> None:
        """Raises LamellaError if the folder's run has other settings, naming one that differs."""
        before = settings_of(self.path).model_dump(mode="json")
        now = settings.model_dump(mode="json")
        changed = [key for key in now.keys() | before.keys() if before.get(key) != now.get(key)]
        if changed:
            key = sorted(changed)[0]
            raise LamellaError(
                f"{self.path} holds a run with {key}={before.get(key)!r}, and this one has "
                f"{key}={now.get(key)!r}. Give that run's settings to go on with it, another folder with -o, "
                "or --force to start afresh."
            )

    def _clear(self) -> None:
        for name in _OURS:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Versions and machine of this run, without names of users, hosts or folders."""
    import torch

    packages = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {"lamella": __version__} | {name: version(name) for name in packages},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
