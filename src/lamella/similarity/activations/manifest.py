"""What a capture says about itself: of which model and text it is, and how far it has come."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamella.backbones.offloading import onloaded
from lamella.compiling import uncompiled
from lamella.errors import LamellaError
from lamella.files import write_atomic

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
        whole_text: whether it reads on when every expert has its samples; captures of the first edition do.
        complete: whether the text has ended, or every expert has its samples.
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
    whole_text: bool = True
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
        """Writes ``manifest.json`` atomically."""
        write_atomic(folder / NAME, json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            LamellaError: there is none, or it is not a manifest of this format.
        """
        path = folder / NAME
        if not path.is_file():
            raise LamellaError(f"{folder} holds no capture: it has no {NAME}. Capture into it first.")
        try:
            saved: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if saved.pop("format") != _FORMAT:
                raise LamellaError(f"{path} is of another format than {_FORMAT}; capture again with this version.")
            return cls(**{**saved, "layers": tuple((index, experts) for index, experts in saved["layers"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LamellaError(f"{path} is not a manifest of a capture: {error}. Capture into a new folder.") from error

    def check_same(self, other: Manifest, folder: Path) -> None:
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
        given = {"model": model_fingerprint(model)}
        if tokenizer is not None and self.tokenizer is not None:
            given["tokenizer"] = tokenizer_fingerprint(tokenizer)
        for name, fingerprint in given.items():
            if getattr(self, name) != fingerprint:
                raise LamellaError(
                    f"The capture in {folder} is of the {name} {getattr(self, name)}, but this {name} is {fingerprint}."
                    f" Use the {name} it was taken from, or capture again into another folder."
                )


_SAMPLED = 256  # values of each tensor, and of each expert in a tensor that holds several
# what a config says about a file or a call, not about the function that the model is
_ASIDE = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"}


def model_fingerprint(model: nn.Module) -> str:
    """Class of a model and a hash of its config and of sampled values of every parameter and saved buffer.

    A tensor of three dimensions is sampled in each index of the first, so that any expert counts. The values are
    hashed as float32: a bfloat16 model that is loaded as float32 is the same model, and so is a compiled one. A change
    of a few single values may go unnoticed.
    """
    model = uncompiled(model)
    config: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    digest = hashlib.sha256(_json({k: v for k, v in config.items() if k not in _ASIDE}))
    for module, named in groupby(model.state_dict().items(), lambda item: item[0].rpartition(".")[0]):
        with onloaded(owner := model.get_submodule(module)):  # once for all of its tensors
            for name, tensor in named:
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                held = getattr(owner, name.rpartition(".")[2]).detach() if tensor.is_meta else tensor
                digest.update(_sampled(held).numpy().tobytes())
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Class of a tokenizer and a hash of all that decides the ids of a text, padding and truncation aside."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        facts = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}
    else:
        facts = json.loads(backend.to_str())
        facts = {name: part for name, part in facts.items() if name not in ("padding", "truncation")}
    return f"{type(tokenizer).__name__} {hashlib.sha256(_json(facts)).hexdigest()[:16]}"


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _sampled(tensor: Tensor) -> Tensor:
    parts = tensor.flatten(1) if tensor.dim() == 3 else tensor.reshape(1, -1)
    # an odd step, so that it does not visit the same few columns of every row
    step = (parts.shape[1] // _SAMPLED) | 1
    return parts[:, ::step].to("cpu", torch.float32).contiguous()
