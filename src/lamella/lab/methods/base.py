"""What a way to fine-tune is, the registry that recipes choose from, and how settings follow from PEFT's configs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from peft import PeftConfig, PeftModel, TaskType
from pydantic import Field, create_model, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from lamella.diagnostics.adapter_folder import SavedAdapter
from lamella.errors import LamellaError
from lamella.lab.schema import Settings, unknown_key
from lamella.tuners.config import FORMER_DEFAULTS, RENAMED
from lamella.tuners.loading import shape_of
from lamella.version import FIRST_VERSION, __version__, defaults_of, is_version

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task

# transformers' names for the head that a task adds to a backbone
_HEADS = ("classifier", "score")

# Fields of a config that follow from the run: its model, its task, and that it trains.
_OF_THE_RUN = {field.name for field in dataclasses.fields(PeftConfig)} | {
    "modules_to_save",
    "base_experts",
    "lamella_version",
}

_DEFAULT = "mola"

# What a recipe meant by a setting that it leaves out, as `FORMER_DEFAULTS` has it of the configs.
_FORMER_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "0.1.0": {
        "mola": {"num_experts": "2-4-6-8"},
        **{name: {"lora_alpha": 16, "target_modules": "all-linear"} for name in ("lora", "lora-only", "molex")},
    }
}

Fields = dict[str, Any]


@dataclasses.dataclass
class Built:
    """A model ready to train, and what its method decided while building it (for the record of the run)."""

    model: nn.Module
    decided: dict[str, Any] = dataclasses.field(default_factory=dict)


class Method(Settings):
    """Settings of one method; `build` turns a backbone into the trainable model."""

    # whether PEFT's files hold all that was trained, so that training can go on from a checkpoint
    resumes: ClassVar[bool] = True
    # whether there is anything that an optimizer would change
    trains: ClassVar[bool] = True
    # whether weight decay may shrink all that it trains
    decays: ClassVar[bool] = True

    name: str

    @property
    def is_mixture(self) -> bool:
        """Whether it is a mixture of which a study asks whether it earns its cost."""
        return False

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The backbone with everything trainable that this method trains, task head included."""
        raise NotImplementedError

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write the adapter, in PEFT's format."""
        # runs never resize the vocabulary, and to find out PEFT would ask the hub
        model.save_pretrained(str(folder), save_embedding_layers=False)

    def load(self, backbone: Backbone, task: Task, folder: Path) -> nn.Module:
        """What `save` wrote, on a fresh backbone.

        Raises:
            LamellaError: a file is missing or damaged, a tensor is missing, is not finite or has no place.
        """
        return SavedAdapter.read(folder).on(backbone.model)

    def taken_up(self, saved: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with which training goes on from a finished run.

        Args:
            saved: of the run's adapter.
            now: of a model that this method has built.

        Raises:
            LamellaError: they are not of one make.
        """
        unlike = [name for name in sorted(saved.keys() | now.keys()) if _shape(saved, name) != _shape(now, name)]
        if unlike:
            raise LamellaError(f"its {unlike[0]} does not fit this model. Give the run's method and sizes.")
        return dict(saved)

    def mean_experts(self) -> float | None:
        """Mean number of experts per layer of a shape that can be scaled; None for other methods."""
        return None

    def with_mean_experts(self, mean: float, where: str) -> Method:
        """The method with its shape scaled to so many experts per layer in the mean; itself where it has no shape.

        Raises:
            LamellaError: it was scaled to another mean already; ``where`` says what to call it.
        """
        return self

    def with_parameters_of(self, other: Method) -> Method:
        """The method with as many trainable parameters as another; itself where its size cannot be chosen."""
        return self


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return shape_of(tensors[name]) if name in tensors else None


class Configured(Method):
    """A method whose settings are those of a PEFT config: a wrong value is an error when it is given."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def config(self, **of_the_run: Any) -> PeftConfig:
        """The config of these settings."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _config_takes_them(self) -> Self:
        self.config()
        return self


_METHODS: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound=Method)


def method(name: str, **fields: Any) -> Callable[[type[_M]], type[_M]]:
    """Register a `Method` under the name that recipes use, with these settings beside those that it declares."""

    def register(cls: type[_M]) -> type[_M]:
        made = create_model(
            cls.__name__,
            __base__=cls,
            __module__=cls.__module__,
            __doc__=cls.__doc__,
            name=(str, name),
            **fields,
        )
        _METHODS[name] = made
        return made

    return register


def settings_of(config: type[PeftConfig], *names: str, without: Collection[str] = ()) -> Fields:
    """What a recipe may set of a config, each with the config's type and default.

    Args:
        config: a dataclass of PEFT's or lamella's.
        names: of the fields; all but those that follow from the run where none is given.
        without: fields to leave out.
    """
    hints = get_type_hints(config, include_extras=True)
    return {
        field.name: (_as_json_has_it(hints[field.name]), _default(field))
        for field in dataclasses.fields(config)
        if (field.name in names if names else field.name not in {*_OF_THE_RUN, *without})
    }


def _as_json_has_it(hint: Any) -> Any:
    """A hint without sets: recipes have lists, and a list keeps its order."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    return Union[tuple(one for one in get_args(hint) if get_origin(one) is not set)]  # noqa: UP007


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else Field(default_factory=factory)


def registered(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        LamellaError: there is none of that name.
    """
    if name not in _METHODS:
        raise LamellaError(unknown_key(name, _METHODS, "method.name=").replace("setting", "method", 1))
    return _METHODS[name]


def all_methods() -> dict[str, type[Method]]:
    """The class of every method, by name."""
    return dict(_METHODS)


def method_from(value: str | Mapping[str, Any]) -> Method:
    """The settings of a method from its name, or from a mapping of its name and settings.

    Raises:
        LamellaError: neither of them, an unknown method, or a key that this method does not have.
    """
    values = method_values(value)
    return registered(values["name"]).parse(values, where="method.")


def method_values(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """The name and the settings of a method as they are given.

    Raises:
        LamellaError: it is neither a name nor a mapping.
    """
    if not isinstance(value, str | Mapping):
        raise LamellaError(f"method is {value!r}. Write a name, such as method=mola, or settings, such as method.r=4.")
    values = {"name": value} if isinstance(value, str) else dict(value)
    return values | {"name": str(values.get("name", _DEFAULT))}


def read_saved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What a finished run or study says of itself, in today's words and with the defaults of the version that wrote it.

    Args:
        tree: its settings or recipe, as plain values; with its ``lamella_version``, which is not among what is
            returned, unless the first version wrote it.
    """
    values = {"methods" if key == "arms" and "methods" not in tree else key: value for key, value in tree.items()}
    writer = values.pop("lamella_version", FIRST_VERSION)
    if not is_version(writer):
        raise LamellaError(f"lamella_version={writer!r} must be a version, such as {__version__!r}.")
    return {key: _read(value, writer, key) for key, value in values.items()}


def _read(value: Any, writer: str, key: str, default: str = _DEFAULT) -> Any:
    if key == "method" and isinstance(value, str | dict):
        return _saved_method(value, writer, default)
    if not isinstance(value, dict):
        return value
    default = "lora-only" if key == "lora" else _DEFAULT  # the LoRAs of a study of composition need no name
    return {name: _read(one, writer, name, default) for name, one in value.items()}


def _saved_method(value: str | dict[str, Any], writer: str, default: str = _DEFAULT) -> str | dict[str, Any]:
    values = {"name": value} if isinstance(value, str) else value
    name = values.get("name", default)
    if name not in _METHODS:
        return value
    known = _METHODS[name].model_fields
    read = {RENAMED[key] if key not in known and RENAMED.get(key) in known else key: values[key] for key in values}
    if isinstance(read.get("match"), str | dict):
        read["match"] = _saved_method(read["match"], writer)
    former = defaults_of(writer, FORMER_DEFAULTS, f"LAMELLA_{name.upper()}")
    former |= defaults_of(writer, _FORMER_SETTINGS, name)
    read = {**{key: former[key] for key in former if key in known}, **read}
    return value if read == {"name": value} else read


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
