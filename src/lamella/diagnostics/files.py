"""An adapter folder by itself: its config, its weights, and nothing that runs code when it is opened."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lamella.diagnostics.weights import examine_numbers
from lamella.errors import LamellaError
from lamella.findings import Examination

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_WEIGHT_NAMES = ("adapter_model", "pytorch_model", "model")


@dataclass(frozen=True)
class AdapterFiles:
    """What a folder holds, so far as it could be read."""

    config: PeftConfig | None
    tensors: dict[str, Tensor] | None


def examine_files(folder: Path, examination: Examination) -> AdapterFiles:
    """Reads config and weights of an adapter folder.

    Raises:
        LamellaError: the config is no JSON object, so this is no adapter.
    """
    _examine_pickles(folder, examination)
    config = _config(folder, examination)
    tensors = _tensors(folder, examination)
    if tensors is not None:
        examine_numbers(tensors, WEIGHTS, examination)
    return AdapterFiles(config, tensors)


def _examine_pickles(folder: Path, examination: Examination) -> None:
    pickles = [
        path.name
        for path in sorted(folder.iterdir())
        if path.suffix in _PICKLES and path.stem.startswith(_WEIGHT_NAMES)
    ]
    if pickles:
        examination.error(
            "pickle-weights",
            "weights are stored as pickle",
            pickles,
            "a pickle can run any code when it is opened",
            f"load them where you trust them, save_pretrained again as {WEIGHTS}, and delete these files",
        )
    examination.saw(f"pickled weights: {len(pickles)} file(s)")


def _config(folder: Path, examination: Examination) -> PeftConfig | None:
    try:
        values = PeftConfig.from_json_file(str(folder / CONFIG))
    except json.JSONDecodeError as error:
        raise LamellaError(f"{folder / CONFIG} is not valid JSON: {error}. Save the adapter again.") from error
    if not isinstance(values, dict):
        raise LamellaError(f"{folder / CONFIG} holds no settings. Save the adapter again.")
    kind = values.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), [str(one.value) for one in PEFT_TYPE_TO_CONFIG_MAPPING], n=1)
        examination.error(
            "method-unknown",
            f"peft_type is {kind!r}" + (f" (did you mean {near[0]!r}?)" if near else ""),
            CONFIG,
            "nothing that is installed here can load the adapter",
            "correct peft_type, or install the package that wrote the adapter",
        )
        return None
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    unknown = sorted(set(values) - known)
    if unknown:
        _report_unknown(unknown, known, values, examination)
        return None
    examination.saw(f"{CONFIG}: {len(values)} keys, all known")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        examination.error(
            "config-invalid",
            f"a value cannot be used: {error}",
            CONFIG,
            "the adapter cannot be loaded",
            "correct the value",
        )
        return None


def _report_unknown(unknown: list[str], known: set[str], values: dict[str, Any], examination: Examination) -> None:
    near = {key: difflib.get_close_matches(key, known, n=1) for key in unknown}
    said = [f"{key!r}" + (f" (did you mean {near[key][0]!r}?)" if near[key] else "") for key in unknown]
    writer = values.get("lamella_version") or values.get("peft_version")
    examination.error(
        "config-key-unknown",
        f"{', '.join(said)} is unknown to {values['peft_type']}" + (f"; written by version {writer}" if writer else ""),
        CONFIG,
        "a setting that is not read is a setting that is not kept: the adapter would not be what was trained",
        "correct the key, or use the version that wrote the file",
    )


def _tensors(folder: Path, examination: Examination) -> dict[str, Tensor] | None:
    path = folder / WEIGHTS
    if not path.is_file():
        examination.error(
            "weights-missing",
            f"there is no {WEIGHTS}",
            folder.name,
            "there is nothing to load: PEFT would use freshly drawn weights or stop",
            "save the adapter again with save_pretrained",
        )
        return None
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        examination.error(
            "weights-unreadable",
            f"the file cannot be read: {error}",
            WEIGHTS,
            "it was cut short or damaged, and the adapter cannot be loaded",
            "copy or save it again",
        )
        return None
    return tensors
