"""A run on disk: what is in its folder, when it may be written, and how nothing in it is ever half there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lamella.adapters.card import CARD
from lamella.errors import LamellaError, UnreadableError
from lamella.files import UNFINISHED, claimed, read_json, read_table, sha256_of, write_atomic
from lamella.lab.runs.settings import RunSettings, settings_of
from lamella.version import __version__

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("lamella")

_DIGESTS = "digests.json"  # the last file of a checkpoint, and of a run the last but metrics.json
_STATE = "trainer_state.json"  # of a checkpoint
_MEASURED = ("model", "task", "method", "seed", "metric", "steps", "trainable_parameters", "notes")
ROWS = "rows.parquet"
ADDED = "was not there"
_CARDS = ("README.md", CARD)
_PLACES = ("base_model_name_or_path", "adapters")
_RESULTS = (
    "predictions.parquet",
    "trace.parquet",
    "trace_by_task.parquet",
    "redundancy.parquet",
    "routing.parquet",
    ROWS,
    "adapter",
    "model",
)
_OURS = (
    "run.yaml",
    "environment.json",
    "log.txt",
    "metrics.json",
    _DIGESTS,
    *_RESULTS,
    "report.html",
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
    def interrupted(self) -> bool:
        """Whether it has a checkpoint to go on from."""
        return any(self.checkpoints.glob(f"checkpoint-*/{_DIGESTS}"))

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer keeps what a resumed run needs; gone when the run is finished."""
        return self.path / "checkpoints"

    def metrics(self, *, as_left: bool = True) -> dict[str, Any]:
        """What a finished run measured.

        Args:
            as_left: refuse what is not as the run left it.

        Raises:
            UnreadableError: the file is damaged, or lacks what every run has.
        """
        path = self.path / "metrics.json"
        if as_left:
            self._check_as_left(path.name)
        measured = read_json(path)
        if missing := [key for key in _MEASURED if key not in measured]:
            raise UnreadableError(f"{path} lacks '{missing[0]}'. Restore it from a copy, or run it again with --force.")
        return measured

    def table(self, name: str, *columns: str) -> pd.DataFrame | None:
        """A Parquet file of the run's results; None where it has none of that name.

        Args:
            name: of the file.
            columns: that it must have.

        Raises:
            UnreadableError: it is damaged, or is not as the run left it.
        """
        self._check_as_left(name)
        path = self.path / name
        return read_table(path, *columns) if path.exists() else None

    def _check_as_left(self, name: str) -> None:
        """Raises UnreadableError if a result is not as the run wrote it, so far as its digests tell."""
        if not (self.path / _DIGESTS).exists():  # the first edition kept none; the doctor says so
            return
        digests = read_json(self.path / _DIGESTS)
        for changed, fate in _changed(self.path, {name: digests[name]} if name in digests else {}).items():
            raise UnreadableError(
                f"{self.path / changed} {fate}. Restore it from a copy, or run it again with --force."
            )

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write down the digests of all results, then `metrics.json`."""
        text = json.dumps(metrics, indent=2) + "\n"
        digests = _digests(self.path, *_RESULTS) | {"metrics.json": hashlib.sha256(text.encode()).hexdigest()}
        self.write_json(_DIGESTS, digests)
        self.write_text("metrics.json", text)

    def changed(self) -> dict[str, str] | None:
        """What became of each result that is not as the run wrote it; None of a run of an edition without digests.

        Raises:
            UnreadableError: the digests are damaged.
        """
        path = self.path / _DIGESTS
        if not path.exists() and not (self.path / ROWS).exists():
            return None
        digests = read_json(path)
        added = _digests(self.path, *_RESULTS).keys() - digests.keys()
        return _changed(self.path, {"metrics.json": "", **digests}) | dict.fromkeys(added, ADDED)

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
            self.remove_checkpoints()  # of a run that was killed between its last file and their removal
            raise LamellaError(
                f"{self.path} holds a finished run, which is never overwritten. Choose another folder with -o, "
                "or give --force to delete that run first."
            )
        if self.interrupted:
            self.check_same(settings)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """No other process may write here meanwhile; the kernel gives the lock back however this one ends.

        Raises:
            LamellaError: another process is at work on this run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with claimed(self.path) as mine:  # a lock on the folder itself leaves no file in it
            if not mine:
                raise LamellaError(
                    f"Another process is at work on the run in {self.path}. Let it finish, or choose another folder "
                    "(-o)."
                )
            yield

    def begin(self, settings: RunSettings, *, force: bool = False) -> None:
        """Write what was asked for and on which machine; with ``force``, delete the run that was here first."""
        if force:
            self._clear()
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_text("run.yaml", yaml.safe_dump(settings.written(), sort_keys=False))
        self.write_json("environment.json", environment())

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that a run can go on from; newer ones that are not whole are removed, and it is said.

        The best checkpoint before it must be whole too, since its weights become the result.
        """
        for folder in sorted(self.checkpoints.glob("checkpoint-*"), key=_step, reverse=True):
            fault = _fault(folder)
            if fault is None and (best := read_json(folder / _STATE).get("best_global_step")):
                fault = _fault(self.checkpoints / f"checkpoint-{best}")
            if fault is None:
                return folder
            logger.warning("%s cannot be gone on from and is removed: %s", folder.name, fault)
            shutil.rmtree(folder)
        return None

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


def seal(checkpoint: Path) -> None:
    """Write down the digests of a checkpoint's files, last of all: one that agrees with them is whole."""
    write_atomic(checkpoint / _DIGESTS, json.dumps(_digests(checkpoint, ""), indent=2))


def _fault(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole; None where it is."""
    try:
        changed = _changed(checkpoint, {_STATE: "", **read_json(checkpoint / _DIGESTS)})
    except UnreadableError:
        return f"{checkpoint.name} was not written to its end"
    return next((f"{checkpoint.name}/{name} {fate}" for name, fate in changed.items()), None)


def _digests(folder: Path, *parts: str) -> dict[str, str]:
    """SHA-256 of each file in these parts of a folder, but for the cards, which people may write on or anew."""
    files = {file for part in parts for file in (folder / part, *(folder / part).rglob("*")) if file.is_file()}
    return {file.relative_to(folder).as_posix(): _digest(file) for file in sorted(files) if file.name not in _CARDS}


def _digest(file: Path) -> str:
    """SHA-256 of a file; of an adapter's config without the places of base and LoRAs, which may be corrected."""
    if file.name != "adapter_config.json":
        return sha256_of(file)
    try:
        config = {key: value for key, value in read_json(file).items() if key not in _PLACES}
    except UnreadableError:
        return ""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _changed(folder: Path, digests: Mapping[str, Any]) -> dict[str, str]:
    changed = {}
    for name, digest in digests.items():
        if not (folder / name).is_file():
            changed[name] = "is missing"
        elif _digest(folder / name) != digest:
            changed[name] = "is not as it was written"
    return changed


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def environment() -> dict[str, Any]:
    """Versions and machine of this run, without names of users, hosts or folders."""
    import torch

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {"lamella": __version__, **_versions()},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


@cache
def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy")
    return {name: version(name) for name in packages}


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
