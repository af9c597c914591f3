"""What can be set in a benchmark, and what cannot be asked of this machine."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from lamella.bench.encoder import SEQUENCE
from lamella.errors import LamellaError
from lamella.training.schema import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BenchSettings(Settings):
    """Settings of every benchmark."""

    rounds: int = Field(7, ge=2)
    threads: int = Field(1, ge=1)
    tokens: int = Field(1024, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _device_exists(self) -> Self:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise LamellaError("device=cuda was asked for, but torch sees no CUDA device here. Use --device cpu.")
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision of weights and activations."""
        return DTYPES[self.dtype]


class MolaSettings(BenchSettings):
    """Settings of the train-step benchmark: experts 2-4-6-8 of rank r, top-k, on all linear modules of the blocks."""

    hidden: int = Field(384, ge=32)
    layers: int = Field(12, ge=4)
    num_experts: Literal["2-4-6-8"] = "2-4-6-8"
    r: Literal[8] = 8
    top_k: Literal[2] = 2
    dropout: Literal[0] = 0

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        if self.hidden % 32:
            raise LamellaError(
                f"hidden={self.hidden} has no whole number of heads of 32 features; use a multiple of 32."
            )
        if self.tokens > SEQUENCE and self.tokens % SEQUENCE:
            raise LamellaError(f"tokens={self.tokens} fill no whole number of rows of {SEQUENCE}; use a multiple.")
        return self


class FormsSettings(BenchSettings):
    """Settings of the benchmark of one linear layer in its dense and its sorted form."""

    widths: tuple[int, ...] = (768, 2048)
    num_experts: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    r: int = Field(8, ge=1)
    top_k: Literal[2] = 2
