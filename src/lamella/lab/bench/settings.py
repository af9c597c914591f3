"""What can be set in a benchmark, and what cannot be asked of this machine."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from lamella.errors import LamellaError
from lamella.lab.bench.encoder import SEQUENCE
from lamella.lab.schema import Settings

# A batch whose sequences disagree is timed with up to this many different guests in every block.
MOST_GUESTS = 4

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


class EncoderSettings(BenchSettings):
    """Settings of the benchmarks of a whole encoder."""

    hidden: int = Field(384, ge=32)
    layers: int = Field(12, ge=4)
    r: Literal[8] = 8
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


class MolaSettings(EncoderSettings):
    """Settings of the train-step benchmark: experts 2-4-6-8 of rank r, top-k, on all linear modules of the blocks."""

    num_experts: Literal["2-4-6-8"] = "2-4-6-8"
    top_k: Literal[2] = 2


class MolexSettings(EncoderSettings):
    """Settings of MoLEx's benchmark: one guest in every block, LoRA of rank r on query and value inside the blocks.

    Inference is timed for each number of sequences in ``inference_batches`` with each of ``inference_threads`` that the
    machine has cores for.
    """

    layers: int = Field(12, ge=MOST_GUESTS + 1)
    alpha: float = Field(0.95, gt=0, lt=1)
    inference_batches: tuple[PositiveInt, ...] = (1, 32)
    inference_threads: tuple[PositiveInt, ...] = (1, 2)

    @model_validator(mode="after")
    def _sequences_can_disagree(self) -> Self:
        if self.tokens < MOST_GUESTS * SEQUENCE:
            raise LamellaError(
                f"tokens={self.tokens} are fewer than {MOST_GUESTS} rows of {SEQUENCE}, whose sequences could choose "
                f"{MOST_GUESTS} different guests; use at least {MOST_GUESTS * SEQUENCE}."
            )
        return self


class MoleSettings(BenchSettings):
    """Settings of the benchmark of one frozen linear layer with K frozen LoRAs."""

    tokens: int = Field(2048, ge=1)
    width: PositiveInt = 768
    num_loras: tuple[PositiveInt, ...] = (2, 8, 32, 128)
    r: PositiveInt = 8


class SimilaritySettings(BenchSettings):
    """Settings of the benchmark of comparing experts.

    ``grids`` are (features, experts on each side) of training alone; the rest is of the whole flow: a model of
    Qwen1.5-MoE's shape but narrow, of which ``side`` experts of one layer are compared with as many of the next, on so
    many ``batches`` of 8 x 128 tokens. The whole flow takes minutes a round and has rounds of its own.
    """

    rounds: int = Field(5, ge=2)
    tokens: int = Field(1024, ge=1)
    grids: tuple[tuple[PositiveInt, PositiveInt], ...] = ((64, 8), (256, 4))
    samples: PositiveInt = 256
    steps: PositiveInt = 10
    flow_rounds: int = Field(2, ge=2)
    width: PositiveInt = 128
    layers: int = Field(24, ge=2)
    experts: int = Field(60, ge=15)
    side: PositiveInt = 8
    batches: PositiveInt = 6


class FormsSettings(BenchSettings):
    """Settings of the benchmark of one linear layer in its dense and its sorted form."""

    widths: tuple[int, ...] = (768, 2048)
    num_experts: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    r: int = Field(8, ge=1)
    top_k: Literal[2] = 2
