"""What a run is made of: a recipe file, overrides and defaults become one `RunSettings`."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PrivateAttr, SerializeAsAny, field_validator, model_validator

from lamella.errors import LamellaError, UnreadableError
from lamella.files import read_yaml
from lamella.lab.data.derived import JOINT
from lamella.lab.methods import Method, method_from, read_saved
from lamella.lab.schema import Settings
from lamella.version import __version__

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0.0)]


class RunSettings(Settings):
    """One training run."""

    _written: Mapping[str, Any] | None = PrivateAttr(None)  # what its file says, where it was read from one

    model: str = Field("minilm", description="a demo asset, a hub id or a path")
    task: str = Field("trec", description="a named task, hub:NAME or file:ROWS; `tasks` is a list of several")
    method: SerializeAsAny[Method] = Field(
        default_factory=lambda: method_from("mola"), description="its name and its settings"
    )
    start: str | None = Field(None, description="a finished run whose adapter and head are trained on")
    seed: int = Field(0, ge=0, lt=2**32, description="NumPy takes no larger one")

    epochs: Rate | None = Field(None, description="passes over the training rows; 1 if max_steps is absent too")
    max_steps: Positive | None = Field(None, description="optimizer steps, in place of epochs")
    batch_size: Positive = Field(32, description="rows per process and forward pass")
    accumulation: Positive = Field(1, description="forward passes per optimizer step")
    lr: Rate = Field(2e-3, description="learning rate at its highest")
    router_lr: float | None = Field(
        None, ge=0.0, description="learning rate of the routers, 0 to leave them; absent: lr"
    )
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW's, of all that trains but routers")
    router_weight_decay: float = Field(0.0, ge=0.0, description="AdamW's, of the routers")
    warmup_ratio: float = Field(0.06, ge=0.0, lt=1.0, description="share of the steps in which the rate rises")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "linear", description="how the rate falls after that"
    )
    max_grad_norm: float = Field(1.0, ge=0.0, description="0 switches clipping off")

    max_length: Positive = Field(128, description="tokens per row; longer rows are cut")
    limit: Positive | dict[Literal["train", "validation", "test"], Positive] | None = Field(
        None, description="rows used: of every split, or by split; all if absent"
    )
    packing: bool = Field(False, description="causal LM: rows of max_length filled with consecutive text")
    task_temperature: Rate = Field(
        1.0, description="of several tasks: shares of the rows as rows ** (1 / temperature); 1 takes every row alike"
    )
    length_sorted: bool = Field(True, description="batches of rows alike in length, in random order")

    bf16: bool = Field(False, description="forward and backward in bfloat16, weights in float32")
    gradient_checkpointing: bool = Field(False, description="less memory for more time: activations computed twice")
    threads: Positive | None = Field(None, description="CPU threads; torch's default if absent")

    plain_text: str | None = Field(
        None, description="language models: running text whose loss says what was forgotten of the base, such as news"
    )
    eval_batch_size: Positive = Field(64, description="rows per process and forward pass when scoring")
    evaluate_every: Positive | None = Field(
        None, description="steps between scores on validation, each with a checkpoint; a quarter of the run if absent"
    )
    keep: Literal["best", "last"] = Field("best", description="which checkpoint becomes the result, by validation")
    log_every: Positive = Field(10, description="steps between entries of the log")
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="trackers that are told what is logged; each has to be installed"
    )

    @model_validator(mode="after")
    def _all_read(self) -> RunSettings:
        if self.max_steps is not None and self.epochs is not None:
            raise LamellaError(
                f"max_steps={self.max_steps} and epochs={self.epochs:g} both say when to stop. Give one of them."
            )
        if self.max_steps is None and self.epochs is None:
            self.epochs = 1.0
        if (self.weight_decay or self.router_weight_decay) and not self.method.decays:
            raise LamellaError(
                f"{self.method.name} keeps what earlier stages learned, and weight decay would change it. Leave "
                "weight_decay and router_weight_decay at 0."
            )
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "") -> RunSettings:
        """As `Settings.parse`; ``tasks``, a list, is short for the one task that they are together."""
        if "tasks" not in values:
            return super().parse(values, where)
        if "task" in values:
            raise LamellaError(f"The settings have task={values['task']!r} and tasks. Give one of them.")
        others = {key: value for key, value in values.items() if key != "tasks"}
        return super().parse(others | {"task": joint_name(values["tasks"], f"{where}tasks")}, where)

    @property
    def label(self) -> str:
        """A folder name that says what the run is."""
        parts = (Path(self.model).name, Path(self.task.rpartition(":")[2]).stem, self.method.name, f"seed{self.seed}")
        return "-".join(parts)

    @property
    def digest(self) -> str:
        """Names what was asked for, wherever the model, the task and other runs' LoRAs lie now."""
        return _digest(self._asked)

    @property
    def digest_as_written(self) -> str:
        """The same of the settings that the run's file has, by which an edition with fewer of them named it."""
        return _digest(_as_written(self._asked, self._asked if self._written is None else self._written))

    @property
    def _asked(self) -> dict[str, Any]:
        return self.model_dump(
            mode="json", exclude={"model": True, "task": True, "start": True, "method": {"adapters"}}
        )

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Method:
        return value if isinstance(value, Method) else method_from(value)


def _digest(asked: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _as_written(values: dict[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """The values of those keys, at every depth, that were written."""
    return {
        key: _as_written(value, written[key])
        if isinstance(value, dict) and isinstance(written[key], Mapping)
        else value
        for key, value in values.items()
        if key in written
    }


def joint_name(tasks: Any, key: str = "tasks") -> str:
    """The name of several tasks as one; of one its own.

    Args:
        tasks: a list of names.
        key: what the user's file calls it.

    Raises:
        LamellaError: it is no list of names.
    """
    if not isinstance(tasks, list) or not tasks or not all(isinstance(name, str) and name for name in tasks):
        raise LamellaError(f"{key}={tasks!r} must be a list of tasks, such as [trec, sst2].")
    if unfit := [name for name in tasks if "+" in name]:
        raise LamellaError(f"{key} has {unfit[0]!r}, and a list of tasks cannot hold a name with '+' in it.")
    return tasks[0] if len(tasks) == 1 else f"{JOINT}{'+'.join(tasks)}"


def settings_of(folder: Path) -> RunSettings:
    """The settings of the run in a folder, whichever version of lamella wrote it.

    Raises:
        LamellaError: ``run.yaml`` cannot be read, or a key or value does not fit.
    """
    path = folder / "run.yaml"
    tree = read_yaml(path)
    missing = sorted(RunSettings.model_fields.keys() - tree.keys())
    if missing and tree.get("lamella_version") == __version__:  # an earlier edition had fewer
        raise UnreadableError(
            f"{path} lacks '{missing[0]}', which lamella {__version__} writes. Restore it from a copy, or run it again."
        )
    try:
        settings = RunSettings.parse(read_saved(tree))
        settings._written = tree
        return settings
    except UnreadableError:
        raise
    except LamellaError as error:
        raise UnreadableError(f"{path} does not describe a run: {error}") from error


def resolve(recipe: str | None, overrides: Iterable[str] = (), **values: Any) -> RunSettings:
    """Settings of a recipe (a file, or the name of a packaged one), then ``values``, then ``key=value`` overrides.

    Keys may be dotted (``method.r=4``); override values are read as YAML. ``method=NAME`` given as a word starts that
    method from its defaults, dropping another method's settings.

    Raises:
        LamellaError: no such recipe, not a mapping, an override without ``=``, an unknown key, an unfit value, or a
            tracker that is not installed.
    """
    tree = read_recipe(recipe) if recipe else {}
    for key, value in values.items():
        if value is not None:
            _place(tree, key, value)
    override(tree, overrides)
    settings = RunSettings.parse(tree)
    for name in settings.report_to:
        if importlib.util.find_spec(name) is None:
            raise LamellaError(f"report_to names {name}, which is not installed here: pip install {name}.")
    return settings


def override(tree: dict[str, Any], words: Iterable[str]) -> None:
    """Put ``key=value`` words, keys dotted and values in YAML, into the tree of a recipe.

    Raises:
        LamellaError: a word without ``=``, or a value that is not YAML.
    """
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise LamellaError(f"'{word}' is not an override; write it as key=value, for example lr=1e-3.")
        _place(tree, key.strip(), _scalar(text))


def changed(settings: RunSettings, values: Mapping[str, Any]) -> RunSettings:
    """Settings with other values of some keys, which may be dotted.

    Raises:
        LamellaError: an unknown key, or a value that does not fit.
    """
    tree = settings.model_dump(mode="json")
    for key, value in values.items():
        _place(tree, key, value)
    return RunSettings.parse(tree)


def read_recipe(name: str) -> dict[str, Any]:
    """The mapping in a YAML file, named by its path or, of a packaged recipe, by its name.

    Raises:
        LamellaError: there is no such file or recipe, or it does not hold a mapping.
    """
    path = Path(name)
    packaged = resources.files("lamella.lab") / "recipes" / f"{name}.yaml"
    if path.is_file():
        return read_yaml(path)
    if not packaged.is_file():
        raise LamellaError(
            f"There is no recipe '{name}': no file of that path, and the packaged ones are {', '.join(recipe_names())}."
        )
    with resources.as_file(packaged) as inside:
        return read_yaml(inside)


def recipe_names() -> list[str]:
    """Names of the recipes inside the package; those in a folder bear its name, as in `published/molex/cola`."""
    with resources.as_file(resources.files("lamella.lab") / "recipes") as folder:
        return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _place(tree: dict[str, Any], dotted: str, value: Any) -> None:
    if dotted in ("task", "tasks"):  # each of them says what is learned, and the later one counts
        tree.pop("task", None), tree.pop("tasks", None)
    *parents, last = dotted.split(".")
    for parent in parents:
        below = tree.get(parent)
        if isinstance(below, str):  # `method: lora` is short for `method: {name: lora}`
            below = {"name": below}
        tree[parent] = dict(below) if isinstance(below, Mapping) else {}
        tree = tree[parent]
    tree[last] = value


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise LamellaError(f"The value '{text}' of an override is not valid YAML: {error}") from error
