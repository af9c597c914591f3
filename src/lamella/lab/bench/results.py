"""What a benchmark measured, as a JSON file that says on what and how."""

from __future__ import annotations

import datetime
import json
import statistics
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lamella.errors import LamellaError
from lamella.files import write_whole
from lamella.lab.bench.equality import Equality
from lamella.lab.runs.folder import environment
from lamella.lab.studies.measuring import Clock, Ratio


class Arm(BaseModel):
    """One of the things timed.

    Attributes:
        name: its name in ratios.
        what: what it is, in words.
        trainable_parameters: how many the optimizer changes.
        seconds: of each round.
        median_seconds: their median.
        kept_mb: activations kept for the backward pass, in 1e6 bytes.
        peak_mb: memory a step takes above what was there, in 1e6 bytes: on a device what it allocates, on a CPU the
            tensors alive at once; None where not measured.
        flops: floating-point operations of its matrix products and attention; None where not counted.
        block_runs: how often a sequence runs through a block, per block of the stack; None where not counted.
    """

    name: str
    what: str
    trainable_parameters: int
    seconds: list[float]
    median_seconds: float
    kept_mb: float
    peak_mb: float | None = None
    flops: int | None = None
    block_runs: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        what: str,
        seconds: list[float],
        trainable_parameters: int,
        kept_mb: float,
        peak_mb: float | None = None,
        flops: int | None = None,
        block_runs: float | None = None,
    ) -> Arm:
        """An arm from the seconds of its rounds."""
        return cls(
            name=name, what=what, trainable_parameters=trainable_parameters, seconds=seconds,
            median_seconds=statistics.median(seconds), kept_mb=kept_mb, peak_mb=peak_mb,
            flops=flops, block_runs=block_runs,
        )  # fmt: skip


class Case(BaseModel):
    """One interleaved run: its arms, whether they agreed, and how their times relate.

    ``threads`` and ``clock`` are the record's, except where a case says its own.
    """

    name: str
    arms: list[Arm]
    equality: Equality
    ratios: list[Ratio]
    threads: int | None = None
    clock: Clock | None = None

    def ratio(self, arm: str, over: str) -> Ratio:
        """The ratio of two arms' times."""
        return next(ratio for ratio in self.ratios if (ratio.arm, ratio.over) == (arm, over))

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


class BenchResult(BaseModel):
    """A benchmark's record.

    Attributes:
        bench: which one.
        date: the day it ran, UTC.
        machine: processor, cores, threads and versions; no names of hosts, users or folders.
        settings: all of them.
        clock: which time was measured.
        cases: its interleaved runs: one for the train step, one per layer shape for the forms, one per number of LoRAs,
            one per batch and number of threads for inference.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    bench: Literal["mola", "forms", "molex", "mole", "similarity"]
    date: str = Field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).date().isoformat())
    machine: dict[str, Any] = Field(default_factory=environment)
    settings: dict[str, Any]
    clock: Clock
    cases: list[Case]


def write_result(result: BenchResult, path: Path) -> None:
    """Writes the record as JSON, whole or not at all."""
    write_whole(path, json.dumps(result.model_dump(mode="json"), indent=1) + "\n")


def load_result(path: Path) -> BenchResult:
    """Reads a record.

    Raises:
        LamellaError: there is no such file, or it is no record of a benchmark.
    """
    try:
        return BenchResult.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError) as error:
        raise LamellaError(
            f"{path} is no record of a benchmark; write one with `lamella bench mola -o {path}`."
        ) from error
