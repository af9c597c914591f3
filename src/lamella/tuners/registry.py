"""How lamella's methods become PEFT methods.

``peft.register_peft_method`` refuses names that are not members of PEFT's own enum, so the three tables it would fill
are filled here, with members of our enum: everything in PEFT and transformers looks a method up in those tables.
"""

import functools
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import peft.utils.transformers_weight_conversion as conversion
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from transformers.core_model_loading import WeightRenaming

from lamella.errors import LamellaError, UnreadableError
from lamella.files import read_json
from lamella.tuners.config import LamellaConfig
from lamella.tuners.model import RoutedModel


class LamellaType(str, Enum):
    """The ``peft_type`` of lamella's methods."""

    MOLA = "LAMELLA_MOLA"
    MOLEX = "LAMELLA_MOLEX"
    MOLE = "LAMELLA_MOLE"


def register(peft_type: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Makes a method known to ``get_peft_model``, ``PeftModel.from_pretrained`` and transformers' ``load_adapter``.

    Args:
        peft_type: member of an enumeration of strings, as PEFT asks of a config's ``peft_type``.
        config: its settings.
        tuner: its model; where it is a `RoutedModel`, all of lamella works with it.

    Raises:
        RuntimeError: another package has registered the same name.
    """
    present = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if present is not None and present.__module__ != config.__module__:
        raise RuntimeError(f"{str(peft_type)!r} is already registered with PEFT by {present.__module__}.")
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner.prefix


def say_what_was_done() -> None:
    """Makes ``print_trainable_parameters`` also print the injection's summary, for lamella's adapters alone.

    PEFT has no hook there, and a count without the layers it comes from is where experts get lost unseen.
    """
    original = PeftModel.print_trainable_parameters
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def print_trainable_parameters(model: PeftModel) -> None:
        original(model)
        for adapter, summary in getattr(model.base_model, "summaries", {}).items():
            if adapter in model.active_adapters:
                print(summary)

    PeftModel.print_trainable_parameters = print_trainable_parameters


def read_saved_configs() -> None:
    """Lets a method's config class read its files: keys of earlier versions, and paths relative to the file's folder.

    PEFT and transformers read configs by the base class, and only here is it known which folder they come from.
    """
    original: Callable[..., dict[str, Any]] = PeftConfigMixin.from_json_file.__func__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def from_json_file(cls: type[PeftConfig], path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        kind = read_json(Path(path_json_file)).get("peft_type")  # refuses a damaged file by its name
        attributes = original(cls, path_json_file, **kwargs)
        config = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
        if config is None or not issubclass(config, LamellaConfig):
            if "lamella_version" in attributes:
                raise LamellaError(
                    f"{path_json_file} was written by lamella, and peft_type={kind!r} is none of its methods. Restore "
                    "peft_type, or install the package that adds that method."
                )
            return attributes
        return config.read_saved(attributes, Path(path_json_file).parent)

    PeftConfigMixin.from_json_file = classmethod(from_json_file)  # type: ignore[arg-type]


def name_what_is_damaged() -> None:
    """Makes ``load_adapter`` of a PeftModel say which of lamella's adapters could not be loaded, and leave none of it.

    PEFT makes room for an adapter before it looks at the file, and passes on what the readers of files say, without
    the file's name.
    """
    original = PeftModel.load_adapter
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def load_adapter(model: PeftModel, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        present = adapter_name in model.peft_config
        try:
            return original(model, model_id, adapter_name, *args, **kwargs)
        except BaseException as error:
            if not isinstance(model.peft_config.get(adapter_name), LamellaConfig):
                raise
            reason = _damage(model, adapter_name, error)
            if not present:
                model.delete_adapter(adapter_name)
            if reason is None:
                raise
            raise UnreadableError(
                f"The tensors of the adapter in {model_id} (adapter_model.safetensors) cannot be loaded: "
                f"{reason.rstrip('.')}. Restore the file from a copy, or save the adapter again."
            ) from error

    PeftModel.load_adapter = load_adapter


def _damage(model: PeftModel, adapter: str, error: BaseException) -> str | None:
    """What an error says of an adapter's file; None where it comes from elsewhere, as from a mistake in the code."""
    if isinstance(error, SafetensorError | OSError | HFValidationError):  # the last where a folder holds no weights
        return str(error).split("\n")[0]
    if isinstance(error, KeyError) and error.args[0] in _whole_in_file(model, adapter):
        return f"it has no {error.args[0]}"
    return None


def _whole_in_file(model: PeftModel, adapter: str) -> set[str]:
    """The names under which PEFT looks in a file for what was trained whole: heads, tokens."""
    wrappers = (one for one in model.named_modules() if isinstance(one[1], AuxiliaryTrainingWrapper))
    return {f"{name}.{key}" for name, module in wrappers for key in module.adapter_state_dict_load_map(adapter)}


def rename_tensors() -> None:
    """Makes transformers' own ``load_adapter`` find tensors whose names in a file differ from those in a model.

    It puts the adapter's name into the keys that carry the method's own prefix, behind the first part. A MoLEx file
    holds a LoRA beside those, and a tensor alone in its module is called as the module's container.
    """
    original = conversion.build_peft_weight_mapping
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def build_peft_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> list[Any]:
        renamings: list[Any] = original(weight_conversions, adapter_name, peft_config=peft_config)
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(getattr(peft_config, "peft_type", None))
        if not renamings or tuner is None or not issubclass(tuner, RoutedModel):
            return renamings
        beside = [(rf"({prefix}[^\.]*)", rf"\1.{adapter_name}") for prefix in tuner.also_loaded_strictly]
        lone = [(rf"({name}\.{re.escape(adapter_name)})$", r"\1.weight") for name in tuner.lone_tensors]
        return [*renamings, *(WeightRenaming(source, target) for source, target in beside + lone)]

    conversion.build_peft_weight_mapping = build_peft_weight_mapping
