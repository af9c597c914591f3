"""What may come of a broken file: it is named, it makes no difference, or it is a file that says something else."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from peft import PeftConfig
from safetensors import safe_open
from torch import Tensor

from lamella import LamellaError
from lamella.tuners.kinds import fits


class Ending(Enum):
    """How a case ended."""

    NAMED = "named"  # an error of lamella's, or of PEFT's that names the file
    EQUAL = "equal"  # to the last bit, what the whole file gives
    ANOTHER = "another valid file"  # as `says_something_else` has it
    OTHER = "other"


def judge(use: Callable[[], Any], expected: Any, says_something_else: Callable[[], bool]) -> tuple[Ending, str]:
    """How the use of a broken file ends, and what was said.

    Args:
        use: of the file; it gives tensors, or what can be compared with ``==``.
        expected: what the whole file gives.
        says_something_else: whether the broken file is a valid one with other contents.
    """
    try:
        actual = use()
    except LamellaError as error:
        return Ending.NAMED, str(error)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return (Ending.NAMED if _names_the_file(error) else Ending.OTHER), said
    if isinstance(actual, Tensor) and not bool(torch.isfinite(actual).all()):
        return Ending.OTHER, "not finite"
    same = torch.equal(actual, expected) if isinstance(expected, Tensor) else actual == expected
    if same:
        return Ending.EQUAL, ""
    return (Ending.ANOTHER, "") if says_something_else() else (Ending.OTHER, "another result, and nothing is said")


def _names_the_file(error: Exception) -> bool:
    """Whether the system says which file cannot be written, or PEFT which is missing: it looks before lamella does."""
    if isinstance(error, OSError):
        return bool(error.filename)
    said = str(error)
    return isinstance(error, ValueError) and ("adapter_config.json" in said or "adapter_model" in said)


def another_adapter(folder: Path, whole: Path, config: type[PeftConfig]) -> bool:
    """Whether a folder holds another valid adapter: of the same keys and tensors, each of the right kind.

    Keys: none is lost or new, and each whose value differs has one of the kind and in the range that the method's
    config states. Tensors: the names and shapes are the same, all are floating-point numbers, and all are finite.
    """
    try:
        return _another_config(_read(folder), _read(whole), config) and _another_tensors(folder, whole)
    except Exception:
        return False


def _read(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return tree


def _another_config(theirs: Mapping[str, Any], ours: Mapping[str, Any], config: type[Any]) -> bool:
    hints = get_type_hints(config, include_extras=True)
    for key in theirs.keys() | ours.keys():
        if key not in theirs or key not in ours:
            return False
        if _same(theirs[key], ours[key]):
            continue
        inner = next((one for one in get_args(hints[key]) if is_dataclass(one)), None)
        if inner is not None and isinstance(theirs[key], dict):
            if not _another_config(theirs[key], ours[key], inner):
                return False
        elif not (fits(theirs[key], hints[key]) or (config.__module__.startswith("peft.") and key in _names(config))):
            return False
    return True


def _names(config: type[Any]) -> set[str]:
    """PEFT's settings whose kinds PEFT itself answers for: all but numbers and truth values."""
    hints = get_type_hints(config)
    return {field.name for field in fields(config) if hints[field.name] not in (int, float, bool)}


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _another_tensors(folder: Path, whole: Path) -> bool:
    ours, theirs = _tensors(whole), _tensors(folder)
    return ours.keys() == theirs.keys() and all(
        theirs[name].shape == tensor.shape
        and theirs[name].is_floating_point() == tensor.is_floating_point()
        and bool(torch.isfinite(theirs[name]).all())
        for name, tensor in ours.items()
    )


def _tensors(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def says_what_is_read(given: Any, read: Any) -> bool:
    """Whether what was read of a recipe is what stands in it: each key that it gives has that very value.

    A number or a truth value may stand in quotes, and 1 and 0 for a truth value.
    """
    if isinstance(given, str) and not isinstance(read, str):
        given = yaml.safe_load(given)
    if isinstance(given, dict):
        return isinstance(read, dict) and all(k in read and says_what_is_read(v, read[k]) for k, v in given.items())
    if isinstance(given, list):
        return isinstance(read, list) and len(given) == len(read) and all(map(says_what_is_read, given, read))
    if isinstance(given, bool) or isinstance(read, bool):
        return isinstance(given, int) and given == read
    if isinstance(given, int | float) and isinstance(read, int | float):
        return given == read and math.isfinite(given)
    return type(given) is type(read) and given == read
