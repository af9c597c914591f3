"""A benchmark: its settings, what it runs, and the record of what it measured as a JSON file."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from benchmarks.equality import Equality
from lamella.errors import LamellaError
from lamella.files import write_atomic
from lamella.lab.runs.folder import environment
from lamella.lab.schema import Settings
from lamella.lab.studies.measuring import Clock, Ratio

Say: TypeAlias = Callable[[str], object]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BenchSettings(Settings):
    """Settings of every benchmark: ``tokens`` of a step, none of them padding, and where and how it is timed."""

    rounds: int = Field(7, ge=2)
    threads: int = Field(1, ge=1)
    tokens: int = Field(1024, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _device_exists(self) -> Self:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise LamellaError("device=cuda was asked for, but torch sees no CUDA device here. Use device=cpu.")
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision of weights and activations."""
        return _DTYPES[self.dtype]


class Method(BaseModel):
    """One of the methods timed.

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
        perplexity: of the texts that it reads; None where it predicts nothing that means anything.
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
    perplexity: float | None = None


class Case(BaseModel):
    """One interleaved run: its methods, called "arms" in files, whether they agreed, and how their times relate.

    ``threads`` and ``clock`` are the record's, except where a case has others.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(populate_by_name=True)

    name: str
    methods: list[Method] = Field(validation_alias="arms", serialization_alias="arms")
    equality: Equality
    ratios: list[Ratio]
    threads: int | None = None
    clock: Clock | None = None

    def ratio(self, method: str, over: str) -> Ratio:
        """The ratio of two methods' times."""
        return next(ratio for ratio in self.ratios if (ratio.method, ratio.over) == (method, over))

    def method(self, name: str) -> Method:
        """The method called ``name``."""
        return next(method for method in self.methods if method.name == name)


class Record(BaseModel):
    """What a benchmark measured.

    Attributes:
        bench: which one.
        date: the day it ran, UTC.
        machine: processor, cores, threads and versions; no names of hosts, users or folders.
        settings: all of them.
        clock: which time was measured.
        cases: its interleaved runs.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    bench: str
    date: str = Field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).date().isoformat())
    machine: dict[str, Any] = Field(default_factory=environment)
    settings: dict[str, Any]
    clock: Clock
    cases: list[Case]

    def write(self, path: Path) -> None:
        """The record as a JSON file that appears when it is complete."""
        write_atomic(path, json.dumps(self.model_dump(mode="json", by_alias=True), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in a JSON file.

        Raises:
            LamellaError: there is no such file, or it is not the record of a benchmark.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValidationError) as error:
            raise LamellaError(
                f"{path} is not the record of a benchmark; write one with `python -m benchmarks mola -o {path.parent}`."
            ) from error


@dataclass(frozen=True)
class Target:
    """A figure of a record, and what it is to be.

    Attributes:
        figure: what it is, in words.
        measured: a ratio of times, or of other quantities.
        most, least: its bound, if it has one; the median of a ratio of times counts.
        digits: decimals of the bound on the page.
    """

    figure: str
    measured: Ratio | float
    most: float | None = None
    least: float | None = None
    digits: int = 2

    @property
    def met(self) -> bool:
        """Whether the figure keeps to its bound."""
        value = self.measured.median if isinstance(self.measured, Ratio) else self.measured
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark is made of.

    Attributes:
        settings: class of its settings.
        quick: changes to the settings for a run of seconds, whose figures mean nothing.
        run: the measured cases; told what begins.
        targets: the figures of a record that it is judged by.
        shape: what was measured, in words, from a record's settings.
        by_case: names of the cases, by their beginning, that are shown as a row each; the others have a row per method.
    """

    settings: type[BenchSettings]
    quick: dict[str, Any]
    run: Callable[[Any, Say], Sequence[Case]]
    targets: Callable[[Record], Sequence[Target]]
    shape: Callable[[dict[str, Any]], str]
    by_case: str | None = None
