"""The ways to fine-tune: each is a block of settings that builds the trainable model from a backbone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from peft import LoraConfig, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from pydantic import Field, SerializeAsAny, field_validator
from torch import nn

from lamella.errors import LamellaError
from lamella.training.fixed_guest import find_fixed_layer
from lamella.training.schema import Settings, unknown_key
from lamella.tuners.mola import MolaConfig
from lamella.tuners.molex import MolexConfig

if TYPE_CHECKING:
    from lamella.data import Backbone, Task

# transformers' names for the head that a task adds to a backbone
_HEADS = ("classifier", "score")


@dataclasses.dataclass
class Built:
    """A model ready to train, and what its method decided while building it (for the record of the run)."""

    model: nn.Module
    decided: dict[str, Any] = dataclasses.field(default_factory=dict)


class Method(Settings):
    """Settings of one method; `build` turns a backbone into the trainable model."""

    name: str

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The backbone with everything trainable that this method trains, task head included."""
        raise NotImplementedError


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


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that an optimizer would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@method("head")
class Head(Method):
    """Only the task head is trained."""

    name: Literal["head"] = "head"

    def build(self, backbone: Backbone, task: Task) -> Built:
        """Raises LamellaError for a language model, which has no task head."""
        if not _head_names(backbone.model):
            raise LamellaError(
                f"The method 'head' trains the task head alone, and '{backbone.name}' has none for the task "
                f"'{task.name}' ({task.kind}). Choose lora, mola, molex, prompt-tuning or full."
            )
        # PEFT's own name for an adapter without adapted modules: the saved folder is a PEFT folder all the same
        config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, **_shared(backbone, task))
        return Built(get_peft_model(backbone.model, config))


@method("mola")
class Mola(Method):
    """Layer-wise mixtures of LoRA experts; the keys are those of `lamella.MolaConfig`."""

    name: Literal["mola"] = "mola"
    r: int = Field(8, gt=0)
    lora_alpha: float = 16
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: list[int] | None = None
    num_experts: int | list[int] | str = "2-4-6-8"
    expert_budget: float | None = None
    top_k: int | list[int] = 2
    router: Literal["linear", "cosine"] = "linear"
    balance_coef: float = Field(1e-3, ge=0.0)
    z_coef: float = Field(0.0, ge=0.0)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The mixture; which layer got how many experts is in the model's own summary."""
        config = MolaConfig(**self.model_dump(exclude={"name"}), **_shared(backbone, task))
        return Built(get_peft_model(backbone.model, config))


@method("molex")
class Molex(Method):
    """Mixtures of pretrained blocks with LoRA inside; the keys are those of `lamella.MolexConfig` and of its LoRA."""

    name: Literal["molex"] = "molex"
    r: int = Field(8, gt=0)
    lora_alpha: float = 16
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = Field(None, description="linear modules that the LoRA leaves alone")
    layers_to_transform: list[int] | None = Field(None, description="blocks that mix; the LoRA is in all of them")
    alpha: float = Field(0.95, ge=0.0, le=1.0)
    alpha_mode: Literal["fixed", "learned"] = "fixed"
    alpha_scope: Literal["shared", "per-layer"] = "shared"
    router: Literal["linear", "cosine"] = "linear"
    router_proj: int | None = None
    score: Literal["softmax", "sigmoid"] = "softmax"
    router_scope: Literal["shared", "per-layer"] = "shared"
    top_k: int = Field(1, gt=0)
    granularity: Literal["sequence", "batch", "token"] = "sequence"
    aggregate: Literal["mean", "mode"] = "mean"
    candidates: Literal["all", "later"] | list[int] = "all"
    router_gradient: Literal["scale", "straight-through", "none"] = "scale"
    policy: Literal["learned", "random", "fixed", "self", "uniform"] = "learned"
    fixed_layer: int | None = None
    prompt_tokens: int = Field(4, gt=0)
    balance_coef: float = Field(1e-3, ge=0.0)
    guest_dtype: Literal["float32", "bfloat16"] | None = None
    recompute_guest: bool = False
    seed: int = Field(0, description="of the policy 'random'")

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The mixture; which blocks each one can choose is in the model's own summary.

        Policy "fixed" without a layer finds the best one on training rows; it is in ``decided``.
        """
        inside = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"}
        lora = LoraConfig(**self.model_dump(include=inside))
        config = MolexConfig(lora=lora, **self.model_dump(exclude={"name", *inside}), **_shared(backbone, task))
        decided = {}
        if self.policy == "fixed" and self.fixed_layer is None:
            on_meta = next(backbone.model.parameters()).is_meta  # only counted, and every layer counts the same
            config.fixed_layer = 0 if on_meta else find_fixed_layer(backbone, task, config)
            decided = {"fixed_layer": config.fixed_layer}
        return Built(get_peft_model(backbone.model, config), decided)


@method("lora")
class Lora(Method):
    """PEFT's LoRA; with ``match`` its rank is the one whose trainable parameters come nearest to another method's."""

    name: Literal["lora"] = "lora"
    r: int = Field(8, gt=0)
    lora_alpha: float = 16
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: list[int] | None = None
    match: SerializeAsAny[Method] | None = Field(None, description="a method; lora_alpha / r is kept, r is chosen")

    @field_validator("match", mode="before")
    @classmethod
    def _match(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, Method) else method_from(value)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The adapted model; with ``match``, the rank and both parameter counts are in ``decided``."""
        if self.match is None:
            return Built(get_peft_model(backbone.model, self._config(backbone, task, self.r)))
        target = trainable_parameters(self.match.build(_on_meta(backbone), task).model)
        rank = self._rank_for(target, backbone, task)
        model = get_peft_model(backbone.model, self._config(backbone, task, rank))
        decided = {"rank": rank, "matched_parameters": target, "matched_method": self.match.name}
        return Built(model, decided)

    def _rank_for(self, target: int, backbone: Backbone, task: Task) -> int:
        # LoRA's parameters are an affine function of its rank: two counts give them all
        one, two = (
            trainable_parameters(get_peft_model((meta := _on_meta(backbone)).model, self._config(meta, task, rank)))
            for rank in (1, 2)
        )
        return max(1, round(1 + (target - one) / (two - one)))

    def _config(self, backbone: Backbone, task: Task, rank: int) -> LoraConfig:
        values = self.model_dump(exclude={"name", "match"}) | {"r": rank, "lora_alpha": self.lora_alpha * rank / self.r}
        return LoraConfig(**values, **_shared(backbone, task))


@method("prompt-tuning")
class PromptTuning(Method):
    """Trained virtual tokens before the input (PEFT)."""

    name: Literal["prompt-tuning"] = "prompt-tuning"
    num_virtual_tokens: int = Field(20, gt=0)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """Raises LamellaError for tasks that PEFT's prompt tuning has no model class for."""
        shared = _shared(backbone, task)
        if shared["task_type"] is None:
            raise LamellaError(
                f"Prompt tuning has no form for {task.kind} tasks such as '{task.name}'. Choose lora, mola, molex or "
                "full."
            )
        config = PromptTuningConfig(
            num_virtual_tokens=self.num_virtual_tokens, prompt_tuning_init=PromptTuningInit.RANDOM, **shared
        )
        return Built(get_peft_model(backbone.model, config))


@method("full")
class Full(Method):
    """Every parameter is trained."""

    name: Literal["full"] = "full"

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The backbone itself, all of it trainable."""
        return Built(backbone.model.requires_grad_(True))


def _shared(backbone: Backbone, task: Task) -> dict[str, Any]:
    """What every adapter's config says about the task: its type, and the head that trains and is saved with it."""
    task_type = _task_type(backbone, task)
    # PEFT names the heads of sequence classification itself
    heads = None if task_type == TaskType.SEQ_CLS else _head_names(backbone.model) or None
    return {"task_type": task_type, "modules_to_save": heads}


def _task_type(backbone: Backbone, task: Task) -> TaskType | None:
    if task.kind in ("classification", "pair-classification", "regression"):
        return TaskType.SEQ_CLS
    if backbone.decoder:
        return TaskType.CAUSAL_LM
    return TaskType.SEQ_2_SEQ_LM if task.kind == "seq2seq" else None  # PEFT has no type for an encoder's choices


def _head_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_children() if name in _HEADS]


def _on_meta(backbone: Backbone) -> Backbone:
    """The backbone without memory behind its parameters: enough to count them."""
    with torch.device("meta"):
        model = type(backbone.model)(copy.deepcopy(backbone.model.config))
    return dataclasses.replace(backbone, model=model)
