"""What a capture says about itself: of which model and text it is, and how far it has come."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamella.errors import LamellaError
from lamella.files import write_whole
from lamella.similarity.activations.fingerprint import model_fingerprint, tokenizer_fingerprint

NAME = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FORMAT = 1
_SAME = ("model", "tokenizer", "origin", "seed", "per_expert", "dtype", "layers", "hidden_size")


@dataclass(frozen=True)
class Manifest:
    """Of what a capture is, and how far it has come.

    Attributes:
        model: fingerprint of the model.
        tokenizer: fingerprint of the tokenizer; None where none was given.
        origin: what the text is, a sentence.
        seed: of the sampling.
        per_expert: most samples of an expert.
        dtype: "float32" or "bfloat16", of the samples on disk.
        layers: index and number of experts of each layer.
        hidden_size: features of a sample.
        rows_done: documents taken in.
        tokens: real tokens taken in, as the model's input counts them.
        text: hash of the documents taken in, row by row.
        complete: whether the text has ended.
        shards: folder of the shards, relative to the manifest; of an unfinished capture it is the latest checkpoint's.
    """

    model: str
    tokenizer: str | None
    origin: str
    seed: int
    per_expert: int
    dtype: str
    layers: tuple[tuple[int, int], ...]
    hidden_size: int
    rows_done: int = 0
    tokens: int = 0
    text: int = 0
    complete: bool = False
    shards: str = "."

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        return DTYPES[self.dtype]

    @property
    def identity(self) -> str:
        """What tells a capture from another of the same or another model and text, in words."""
        return (
            f"{self.rows_done:,} documents of hash {self.text}, {self.per_expert:,} samples an expert in {self.dtype}, "
            f"seed {self.seed}, {self.model}"
        )

    def shard(self, folder: Path, layer: int) -> Path:
        """The file of one layer's samples and counts."""
        return folder / self.shards / f"layer-{layer:03d}.safetensors"

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json``, whole or not at all."""
        write_whole(folder / NAME, json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
            LamellaError: there is none, or it is no manifest of this format.
        """
        path = folder / NAME
        if not path.is_file():
            raise LamellaError(f"{folder} holds no capture: it has no {NAME}. Capture into it first.")
        try:
            stated: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if stated.pop("format") != _FORMAT:
                raise LamellaError(f"{path} is of another format than {_FORMAT}; capture again with this version.")
            return cls(**{**stated, "layers": tuple((index, experts) for index, experts in stated["layers"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LamellaError(f"{path} is not a manifest of a capture: {error}. Capture into a new folder.") from error

    def check_same(self, other: "Manifest", folder: Path) -> None:
        """Refuses to go on with a capture of something else.

        Raises:
            LamellaError: ``other`` is of another model, tokenizer, text, or has other settings.
        """
        for name in _SAME:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise LamellaError(
                    f"The capture in {folder} has {name} {mine!r}, but {name} {theirs!r} is asked for. "
                    "Capture into another folder, or delete this one."
                )

    def check(self, folder: Path, model: nn.Module, tokenizer: Any = None) -> None:
        """Refuses a model or tokenizer that the capture is not of.

        Raises:
            LamellaError: another model, or another tokenizer where both are known.
        """
        found = {"model": model_fingerprint(model)}
        if tokenizer is not None and self.tokenizer is not None:
            found["tokenizer"] = tokenizer_fingerprint(tokenizer)
        for name, fingerprint in found.items():
            if getattr(self, name) != fingerprint:
                raise LamellaError(
                    f"The capture in {folder} is of the {name} {getattr(self, name)}, but this {name} is {fingerprint}."
                    f" Use the {name} it was taken from, or capture again into another folder."
                )
