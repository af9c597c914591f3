"""A compressed model on disk: each tensor once, and what is needed to build the model around them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from lamella.aligners import make_aligner
from lamella.backbones.moe import MoELayer, moe_layers
from lamella.errors import LamellaError
from lamella.files import atomic
from lamella.similarity.compression.compressed import Report
from lamella.similarity.compression.pool import AlignedExpert, PooledExperts, StoredExpert
from lamella.similarity.compression.removal import cut

# Not model.safetensors: transformers would open that, find no experts by the names it knows, and draw random ones.
WEIGHTS, MANIFEST = "compressed.safetensors", "compression.json"
# What transformers does not write into a config and what changes the last bits; any torch has these.
_KERNELS = ("_attn_implementation", "_experts_implementation")
_EVERYWHERE = ("eager", "sdpa", "grouped_mm", "batched_mm")


@dataclass(frozen=True)
class Saved:
    """What lies in a folder that ``Compressed.save`` wrote; `print` it.

    Attributes:
        folder: where.
        report: who went, and what is left.
        bytes: of the weights' files.
        opener: of transformers, by which any program opens it; None where only lamella does.
    """

    folder: Path
    report: Report
    bytes: int
    opener: str | None

    @classmethod
    def read(cls, folder: Path) -> Saved:
        """What a folder holds; no weights are read.

        Raises:
            LamellaError: no compressed model, or a broken one.
        """
        manifest = _manifest(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        opener = None if "pools" in manifest else str(manifest["model"])
        return cls(folder, Report.from_dict(manifest["report"]), size, opener)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "folder": str(self.folder), "experts_left": self.report.experts_left, "experts": self.report.experts,
            "parameters": self.report.parameters, "parameters_before": self.report.parameters_before,
            "bytes": self.bytes, "criterion": self.report.criterion, "budget": self.report.budget, "open": self._open,
        }  # fmt: skip

    @property
    def _open(self) -> str:
        if self.opener is None:
            return f'lamella.similarity.Compressed.load("{self.folder}").model'
        return f'transformers.{self.opener}.from_pretrained("{self.folder}")'

    def __str__(self) -> str:
        report = self.report
        why = "" if self.opener else " Plain from_pretrained knows one number of experts for all layers."
        return (
            f"Wrote {self.folder}: {report.experts_left} of {report.experts} experts left (by {report.criterion}, "
            f"keeping {report.budget:.1%}), {report.parameters:,} of {report.parameters_before:,} parameters, "
            f"{self.bytes / 1e9:.3g} GB. Open it with {self._open}.{why}"
        )


def save(
    model: PreTrainedModel, report: Report, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Writes weights, config, manifest and report, and the tokenizer if there is one, atomically."""
    refuse_existing(folder)
    name = type(model).__name__
    if not hasattr(transformers, name):
        raise LamellaError(
            f"transformers has no class {name} to load the compressed model by; save a plain model of it."
        )
    manifest = {
        "model": name,
        "kernels": {kernel: getattr(model.config, kernel) for kernel in _KERNELS},
        "report": report.to_dict(),
    }
    ordinary = is_ordinary(model)
    with atomic(folder) as unfinished:
        unfinished.mkdir()
        if ordinary:
            model.save_pretrained(unfinished)
        else:
            tensors, manifest["aliases"] = _unique(model)
            manifest["pools"] = {name: _kinds(pool) for name, pool in _pools(model).items()}
            save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
            model.config.save_pretrained(unfinished)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def is_ordinary(model: PreTrainedModel) -> bool:
    """Whether the model's config and class alone say which tensors it has, and of which shapes."""
    with torch.device("meta"), no_init_weights():
        plain = type(model)(copy.deepcopy(model.config))
    named = ({name: tensor.shape for name, tensor in _all_tensors(one).items()} for one in (plain, model))
    return next(named) == next(named)


def refuse_existing(folder: Path) -> None:
    """Whatever lies there stays: another model, a study, or an earlier compressed model.

    Raises:
        LamellaError: something lies there.
    """
    if folder.exists():
        raise LamellaError(f"{folder} exists already, and nothing is overwritten. Choose another folder to save to.")


def load(folder: Path) -> tuple[PreTrainedModel, Report]:
    """Builds the model that ``save`` wrote, in evaluation mode."""
    manifest = _manifest(folder)
    if "pools" not in manifest:
        return _load_ordinary(folder, manifest)
    tensors = _tensors(folder)
    config = AutoConfig.from_pretrained(folder)
    for kernel, chosen in manifest["kernels"].items():
        if chosen in _EVERYWHERE:
            setattr(config, kernel, chosen)
    with no_init_weights():  # the memory of experts that are not there is never touched
        model = getattr(transformers, manifest["model"])(config)
    report = Report.from_dict(manifest["report"])
    model = cut(model, report.kept)
    try:
        _fill(model, manifest, tensors)
    except (KeyError, RuntimeError) as error:
        raise LamellaError(f"{folder / WEIGHTS} and {folder / MANIFEST} do not belong together: {error}") from error
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval(), report


def _load_ordinary(folder: Path, manifest: Mapping[str, Any]) -> tuple[PreTrainedModel, Report]:
    kernels = {name.strip("_"): kernel for name, kernel in manifest["kernels"].items() if kernel in _EVERYWHERE}
    model = getattr(transformers, manifest["model"]).from_pretrained(folder, dtype="auto", **kernels)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # as in _tensors
    return model.eval(), Report.from_dict(manifest["report"])


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise LamellaError(
            f"{folder} holds no compressed model ({MANIFEST} is missing); give the folder that save wrote."
        )
    with _telling(folder):
        written: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return written


def _tensors(folder: Path) -> dict[str, Tensor]:
    with _telling(folder):
        # copies, since a mapped file is aligned otherwise than memory, which changes the last bits of products
        return {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}


@contextmanager
def _telling(folder: Path) -> Iterator[None]:
    try:
        yield
    except (json.JSONDecodeError, SafetensorError, FileNotFoundError) as error:
        raise LamellaError(
            f"The compressed model in {folder} is broken ({error}); compress and save it anew."
        ) from error


def _unique(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every parameter and buffer by its first name, and the other names of those that are tied."""
    first: dict[int, str] = {}
    tensors, aliases = {}, {}
    for name, tensor in _all_tensors(model).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().contiguous()
    return tensors, aliases


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those too that state_dict leaves out: they may have been rounded."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _pools(model: nn.Module) -> dict[str, PooledExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PooledExperts)}


def _kinds(pool: PooledExperts) -> list[str | None]:
    """For each stored module the kind of its aligner; None where it is an expert."""
    return [one.aligner.kind if isinstance(one, AlignedExpert) else None for one in pool.stored]


def _fill(model: PreTrainedModel, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Puts pools in the places of the experts, then every tensor in its own place."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = {names[id(layer.experts_module)]: layer for layer in moe_layers(model)}
    for name, kinds in manifest["pools"].items():
        model.set_submodule(name, _skeleton(name, kinds, layers[name], manifest["aliases"], tensors))
    named = {**tensors, **{alias: tensors[first] for alias, first in manifest["aliases"].items()}}
    present = _all_tensors(model)
    if wrong := sorted(named.keys() ^ present.keys()):
        raise KeyError(f"{wrong[0]} is missing or unknown")
    parameters: dict[str, nn.Parameter] = {}
    for name, old in present.items():
        first = manifest["aliases"].get(name, name)
        if isinstance(old, nn.Parameter):
            new: Tensor = parameters.setdefault(first, nn.Parameter(named[name]))
        else:
            new = named[name]
        if new.shape != old.shape:
            raise KeyError(f"{name} has the shape {tuple(new.shape)}, not {tuple(old.shape)}")
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, new)


def _skeleton(
    name: str, kinds: list[str | None], layer: MoELayer, aliases: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> PooledExperts:
    """A pool with room for its tensors."""
    activation = layer.experts[0].activation
    known = {**tensors, **{alias: tensors[first] for alias, first in aliases.items()}}

    def under(prefix: str) -> dict[str, nn.Parameter]:
        inside = {key.removeprefix(prefix): tensor for key, tensor in known.items() if key.startswith(prefix)}
        return {key: nn.Parameter(torch.empty_like(tensor)) for key, tensor in inside.items() if "." not in key}

    stored: list[nn.Module] = []
    for place, kind in enumerate(kinds):
        prefix = f"{name}.stored.{place}."
        if kind is None:
            stored.append(StoredExpert(under(prefix), activation))
            continue
        aligner = under(f"{prefix}aligner.")
        rank = len(aligner["down"]) if kind == "low-rank" else None
        target = StoredExpert(under(f"{prefix}target."), activation)
        stored.append(AlignedExpert(make_aligner(kind, len(aligner["bias"]), rank), target))
    return PooledExperts(stored, torch.empty_like(known[f"{name}.places"]), layer.family.chosen)
