"""Whether a model has the weights that a LoRA was trained on: compared by the numbers, wherever they are at hand."""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from torch import Tensor, nn

from lamella.adapters.bases import located, published_name
from lamella.adapters.source import LoraSource
from lamella.errors import LamellaError

_CACHED = re.compile(r".*models--(?P<id>[^/]+)/snapshots/[^/]+/?")
_ROWS = 8  # of a matrix are compared
# What the coarsest quantisation in use (four bits) may move a matrix by, as a share of its norm.
_QUANTISED = 0.2
_ROUNDED_ALIKE = 0.99  # of the numbers, at least: programs differ in how they round


def check_base(model: nn.Module, source: LoraSource) -> None:
    """Compares the base that a LoRA names with the model, by their weights where both are at hand.

    The same weights are accepted under any name, in any precision. Where the named base is not on this machine, names
    are all there is: another repository of the hub is refused, and another folder of the same name is accepted with a
    warning.

    Raises:
        LamellaError: they are two models, or nothing says that they are one.
    """
    ours = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    if source.format != "PEFT" or not source.base or not ours:
        return  # kohya names a family or a file
    named, here = _published(source.base), _published(str(ours))
    if named == here:
        return
    revision = None if source.config is None else source.config.revision
    same = has_weights_of(model, source.base, revision)
    if same:
        return
    if same is None and _may_be_one(named, here):
        warnings.warn(
            f"{source.described} was trained on {named}, which is not on this machine, so that its weights could not be"
            f" compared with those of {here}. If they are another model's, it answers nonsense.",
            stacklevel=2,
        )
        return
    found = (
        f"{named} is not on this machine to compare the weights; load the base from there, or download it"
        if same is None
        else "their weights differ; compose it on its own base"
    )
    raise LamellaError(
        f"{source.described} was trained on {named}, and the model here is {here}: {found}. On other weights of the "
        "same shapes a LoRA loads without a word and answers nonsense. If you know that it is the same model, correct "
        "base_model_name_or_path in its adapter_config.json, which no recorded digest counts."
    )


def has_weights_of(model: nn.Module, name: str, revision: str | None = None) -> bool | None:
    """Whether a model's weights are those of a checkpoint on this machine; None where there is nothing to compare.

    A few rows of each matrix are compared, of those that both have: exactly in the same precision, otherwise rounded to
    the coarser one, and to the error of four bits where the model is quantised.

    Args:
        model: with or without adapters, which are not looked at.
        name: a folder, or a hub id that is in the cache.
        revision: of a hub id.
    """
    tensors = _own_tensors(model)
    prefix = f"{getattr(model, 'base_model_prefix', '') or '-'}."
    compared = False
    for file in _weight_files(name, revision):
        with safe_open(file, framework="pt", device="cpu") as saved:
            for key in saved.keys():  # noqa: SIM118
                other = key.removeprefix(prefix) if key.startswith(prefix) else prefix + key
                ours = tensors.get(key) or tensors.get(other)
                if ours is None:
                    continue
                theirs = saved.get_slice(key)
                if ours[1] is None and _of_other_width(ours[0], theirs):
                    return False
                for mine, row in _rows(ours, theirs):
                    compared = True
                    if not _alike(mine, row, ours[1] is not None):
                        return False
    return True if compared else None


def _own_tensors(model: nn.Module) -> dict[str, tuple[Tensor, nn.Module | None]]:
    """A model's parameters under the names they have without adapters, each with its module where it is quantised."""
    tensors: dict[str, tuple[Tensor, nn.Module | None]] = {}
    for name, module in model.named_modules():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        for key, tensor in module.named_parameters(recurse=False):
            is_stored = type(tensor) is nn.Parameter and tensor.is_floating_point() and tensor.dtype.itemsize > 1
            tensors[f"{plain}.{key}" if plain else key] = tensor, None if is_stored else module
    return tensors


def _of_other_width(ours: Tensor, theirs: Any) -> bool:
    """Whether two tensors that are numbers differ in more than their rows, as those of a resized vocabulary do."""
    return theirs.get_dtype() in _NUMBERS and list(ours.shape[1:]) != theirs.get_shape()[1:]


def _rows(ours: tuple[Tensor, nn.Module | None], theirs: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of a tensor and of its counterpart in a file; none where one of them cannot be read as numbers."""
    tensor, quantised = ours
    shape = theirs.get_shape()
    if quantised is not None:
        tensor = _dequantised(quantised)
    if not shape or list(tensor.shape) != shape or tensor.device.type == "meta":
        return
    for at in sorted({round(index) for index in torch.linspace(0, shape[0] - 1, min(_ROWS, shape[0])).tolist()}):
        row = theirs[at : at + 1]
        if not row.is_floating_point() or row.dtype.itemsize == 1:
            return
        yield tensor[at : at + 1].detach().cpu(), row


def _dequantised(module: nn.Module) -> Tensor:
    """A quantised module's weight as numbers; on the meta device where nobody here knows how."""
    try:
        weight: Tensor = dequantize_module_weight(module).detach()
    except (TypeError, AttributeError, RuntimeError, NotImplementedError, ImportError):
        return torch.empty(0, device="meta")
    return weight


def _alike(ours: Tensor, theirs: Tensor, is_quantised: bool) -> bool:
    if is_quantised:
        a, b = ours.double(), theirs.double()
        return bool((a - b).norm() <= _QUANTISED * b.norm())
    if ours.dtype == theirs.dtype:
        return torch.equal(ours, theirs)
    if ours.dtype.itemsize != theirs.dtype.itemsize:
        narrow = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        return bool((ours.to(narrow) == theirs.to(narrow)).double().mean() >= _ROUNDED_ALIKE)
    eps = max(torch.finfo(ours.dtype).eps, torch.finfo(theirs.dtype).eps)  # float16 and bfloat16, of a third
    tiny = max(torch.finfo(ours.dtype).tiny, torch.finfo(theirs.dtype).tiny)
    a, b = ours.double(), theirs.double()
    return bool(((a - b).abs() <= 2 * eps * torch.maximum(a.abs(), b.abs()) + tiny).all())


def _weight_files(name: str, revision: str | None) -> list[Path]:
    """The safetensors files of a checkpoint on this machine; none where there are none."""
    folder = Path(located(name)).expanduser()
    whole, index = (_in_folder_or_cache(folder, name, file, revision) for file in _WEIGHTS)
    if whole is not None:
        return [whole]
    if index is None:
        return []
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [file for shard in sorted(set(shards)) if (file := index.parent / shard).is_file()]


def _in_folder_or_cache(folder: Path, name: str, file: str, revision: str | None) -> Path | None:
    if (folder / file).is_file():
        return folder / file
    with suppress(HFValidationError):
        cached = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    return None


def _published(name: str) -> str:
    """The name under which others know a model; of a folder in the hub's cache, its hub id."""
    cached = _CACHED.fullmatch(name)
    return published_name(cached["id"].replace("--", "/") if cached else name)


def _may_be_one(named: str, here: str) -> bool:
    """Whether two names may mean one model: the last parts are the same, and not those of two owners' repositories."""
    owned = all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in (named, here))
    return not owned and Path(named).parts[-1:] == Path(here).parts[-1:]


_NUMBERS = ("F64", "F32", "F16", "BF16")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
