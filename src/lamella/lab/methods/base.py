"""What a way to fine-tune is, and the registry that recipes choose from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from peft import PeftModel, TaskType
from torch import nn

from lamella.errors import LamellaError
from lamella.lab.schema import Settings, unknown_key
from lamella.tuners.config import RENAMED

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task

# transformers' names for the head that a task adds to a backbone
_HEADS = ("classifier", "score")


@dataclasses.dataclass
class Built:
    """A model ready to train, and what its method decided while building it (for the record of the run)."""

    model: nn.Module
    decided: dict[str, Any] = dataclasses.field(default_factory=dict)


class Method(Settings):
    """Settings of one method; `build` turns a backbone into the trainable model."""

    # whether PEFT's own files hold all that was trained, so that checkpoints can be gone on from
    resumes: ClassVar[bool] = True

    name: str

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The backbone with everything trainable that this method trains, task head included."""
        raise NotImplementedError

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write the adapter, in PEFT's format."""
        # runs never resize the vocabulary, and to find out PEFT would ask the hub
        model.save_pretrained(str(folder), save_embedding_layers=False)

    def load(self, backbone: Backbone, task: Task, folder: Path) -> nn.Module:
        """What `save` wrote, on a fresh backbone."""
        return PeftModel.from_pretrained(backbone.model, str(folder))


_METHODS: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound=type[Method])


def method(name: str) -> Callable[[_M], _M]:
    """Register a `Method` under the name that recipes use."""

    def register(cls: _M) -> _M:
        _METHODS[name] = cls
        return cls

    return register


def method_from(value: str | Mapping[str, Any]) -> Method:
    """The settings of a method from its name, or from a mapping with its name and own keys.

    Raises:
        LamellaError: an unknown method, or a key that this method does not have.
    """
    values = {"name": value} if isinstance(value, str) else dict(value)
    name = values.setdefault("name", "mola")
    if name not in _METHODS:
        raise LamellaError(unknown_key(name, _METHODS, "method.name=").replace("setting", "method", 1))
    return _METHODS[name].parse(values, where="method.")


def read_saved(tree: Any) -> Any:
    """What a finished run or study says of itself, in today's words: keys of methods that had another name.

    Args:
        tree: its recipe or settings, as plain values.
    """
    if isinstance(tree, list):
        return [read_saved(one) for one in tree]
    if not isinstance(tree, dict):
        return tree
    known = _METHODS[tree["name"]].model_fields if tree.get("name") in _METHODS else {}
    names = {key: RENAMED[key] for key in tree if key not in known and RENAMED.get(key) in known}
    return {names.get(key, key): read_saved(value) for key, value in tree.items()}


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that an optimizer would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def shared(backbone: Backbone, task: Task, *, train_head: bool = True) -> dict[str, Any]:
    """What every adapter's config says about the task: its type, and the head that trains and is saved with it."""
    task_type = _task_type(backbone, task)
    if not train_head:  # PEFT would train the head of its sequence classification, so that type is left out
        return {"task_type": None if task_type == TaskType.SEQ_CLS else task_type, "modules_to_save": None}
    # PEFT names the heads of sequence classification itself
    heads = None if task_type == TaskType.SEQ_CLS else head_names(backbone.model) or None
    return {"task_type": task_type, "modules_to_save": heads}


def _task_type(backbone: Backbone, task: Task) -> TaskType | None:
    if task.kind in ("classification", "pair-classification", "regression"):
        return TaskType.SEQ_CLS
    if backbone.decoder:
        return TaskType.CAUSAL_LM
    return TaskType.SEQ_2_SEQ_LM if task.kind == "seq2seq" else None  # PEFT has no type for an encoder's choices


def head_names(model: nn.Module) -> list[str]:
    """The modules that a task added to a backbone."""
    return [name for name, _ in model.named_children() if name in _HEADS]


def require_own_head(backbone: Backbone, task: Task, name: str) -> None:
    """Refuses a head that nobody trained, for a method that does not train it either.

    Raises:
        LamellaError: the backbone's weights have no head for this task.
    """
    from lamella.lab.data.models import has_own_head

    if head_names(backbone.model) and not has_own_head(backbone.model):
        raise LamellaError(
            f"'{name}' trains no task head, and {backbone.name} has none for the task '{task.name}': its new one is "
            "random. Give a model that was saved with its trained head, or a method that trains it."
        )


def on_meta(backbone: Backbone) -> Backbone:
    """The backbone without memory behind its parameters: enough to count them."""
    with torch.device("meta"):
        model = type(backbone.model)(copy.deepcopy(backbone.model.config))
    return dataclasses.replace(backbone, model=model)
