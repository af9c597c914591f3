"""The ways to fine-tune a backbone: PEFT's, lamella's MoLA and MoLEx, its head alone, all of it, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from pydantic import Field, SerializeAsAny, field_validator
from torch import Tensor

from lamella.errors import LamellaError
from lamella.lab.methods.base import (
    Built,
    Configured,
    Method,
    head_names,
    method,
    method_from,
    on_meta,
    require_own_head,
    settings_of,
    shared,
    trainable_parameters,
)
from lamella.lab.methods.fixed_guest import find_fixed_layer, training_texts
from lamella.tuners.config import check_lora
from lamella.tuners.kinds import MOST
from lamella.tuners.model import refusals_in_a_sentence
from lamella.tuners.mola import MolaConfig, MolaLinear
from lamella.tuners.mola.allocation import AUTO, SHAPES
from lamella.tuners.molex import MolexConfig, align_guests
from lamella.tuners.targets import usual_lora_targets

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task

# what recipes set of peft.LoraConfig, for LoRA itself and for the LoRA inside MoLEx
_OF_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules")


@method("mola", **settings_of(MolaConfig))
class Mola(Configured):
    """Layer-wise mixtures of LoRA experts; the keys are those of `lamella.MolaConfig`."""

    @property
    def is_mixture(self) -> bool:
        return bool(self.num_experts != 1)  # one expert is LoRA

    def config(self, **of_the_run: Any) -> MolaConfig:
        """The PEFT config with these settings and those that the run adds."""
        return MolaConfig(**self.model_dump(exclude={"name"}), **of_the_run)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The mixture; which layer got how many experts is in the model's summary."""
        return Built(get_peft_model(backbone.model, self.config(**shared(backbone, task))))

    def mean_experts(self) -> float | None:
        """Of its groups, or what is shared out; None where the experts of each layer are given."""
        config = self.config()
        if not isinstance(config.num_experts, str) or config.num_experts == AUTO:
            return config.expert_budget
        groups = _groups(config.num_experts)
        return config.expert_budget or sum(groups) / len(groups)

    def with_mean_experts(self, mean: float, where: str) -> Method:
        """The same groups, scaled."""
        if self.mean_experts() is None:
            return self
        if (budget := self.config().expert_budget) not in (None, mean):
            raise LamellaError(
                f"{where} has expert_budget={budget:g}, and the method it must equal in size has {mean:g} experts per "
                "layer in the mean. Leave expert_budget away, or set 'budget: none'."
            )
        return self.model_copy(update={"expert_budget": mean})


@method("mola-growing", **settings_of(MolaConfig))
class MolaGrowing(Configured):
    """MoLA that grows with every stage of learning tasks one after the other.

    ``num_experts`` is what a stage adds to each layer. The experts of earlier stages and their rows of the routers stay
    as they are; the new ones, which add nothing at first, train. A run on a later stage has ``start``, the run of the
    stage before.
    """

    decays: ClassVar[bool] = False

    stage: int = Field(1, ge=1, description="how many stages there have been, this one included")

    @property
    def is_mixture(self) -> bool:
        return True

    def config(self, **of_the_run: Any) -> MolaConfig:
        """The PEFT config with the experts of all stages so far.

        Raises:
            LamellaError: the experts of a layer cannot be told from the settings alone.
        """
        values = self.model_dump(exclude={"name", "stage"})
        if self.expert_budget is not None or self.num_experts == AUTO:
            raise LamellaError("mola-growing adds as many experts at every stage: leave expert_budget and 'auto' away.")
        if values.get("share_lora_a"):
            raise LamellaError("mola-growing keeps earlier experts as they are, and with share_lora_a all have one A.")
        if isinstance(values.get("init_lora_weights"), str):
            raise LamellaError("mola-growing starts new experts at zero: leave init_lora_weights away.")
        given = MolaConfig(**values, **of_the_run)  # refuses what is no number of experts
        values["num_experts"] = _times(given.num_experts, self.stage)
        return MolaConfig(**values, **of_the_run)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The mixture, in which the newest experts train alone."""
        model = get_peft_model(backbone.model, self.config(**shared(backbone, task)))
        for layer in model.modules():
            if isinstance(layer, MolaLinear):
                routers = layer.lamella_mola_router  # a layer of one expert has none
                for tensor in (*layer.factors("default"), *routers.parameters()):
                    _keep_first(tensor, len(tensor) * (self.stage - 1) // self.stage)
        return Built(model)

    def taken_up(self, saved: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The run's experts are the first of each layer; a layer that had one gets its first router."""
        if unknown := sorted(saved.keys() - now.keys()):
            raise LamellaError(f"its {unknown[0]} has no place in this model. Give the run's target_modules.")
        taken = dict(now)
        for name, old in saved.items():
            new = now[name]
            if old.shape[1:] != new.shape[1:] or len(old) > len(new):
                raise LamellaError(f"its {name} does not fit this model. Give the run's sizes and the stage after it.")
            taken[name] = torch.cat([old.to(new.dtype), new[len(old) :]])
        return taken


def _groups(shape: str) -> tuple[int, ...]:
    return SHAPES.get(shape) or tuple(map(int, shape.split("-")))


def _times(experts: Any, stages: int) -> Any:
    if isinstance(experts, str):
        return "-".join(str(count * stages) for count in _groups(experts))
    return [count * stages for count in experts] if isinstance(experts, list) else experts * stages


def _keep_first(tensor: Tensor, kept: int) -> None:
    """The first ``kept`` rows get no gradient; AdamW without weight decay then leaves them as they are."""
    if not kept or not tensor.requires_grad:
        return

    def without(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[:kept] = 0.0
        return grad

    tensor.register_hook(without)


@method(
    "molex",
    **settings_of(LoraConfig, *_OF_LORA),
    **settings_of(MolexConfig, without={"lora", "target_modules", "exclude_modules"}),
)
class Molex(Configured):
    """Mixtures of pretrained blocks with LoRA inside; the keys are those of `lamella.MolexConfig` and of its LoRA."""

    @property
    def is_mixture(self) -> bool:
        # the other policies are its controls
        return bool(self.policy == "learned")

    def config(self, **of_the_run: Any) -> MolexConfig:
        """The PEFT config with these settings and those that the run adds."""
        lora = LoraConfig(**self.model_dump(include=set(_OF_LORA)))
        return MolexConfig(lora=lora, **self.model_dump(exclude={"name", *_OF_LORA}), **of_the_run)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The mixture; which blocks each one can choose is in the model's summary.

        Policy "fixed" without a layer finds the best one on training rows; it is in ``decided``. So is what the aligner
        of a second model leaves unexplained, which is fitted on texts of training rows.
        """
        config = self.config(**shared(backbone, task))
        decided: dict[str, Any] = {}
        on_meta = next(backbone.model.parameters()).is_meta  # only counted, and every layer counts the same
        if config.policy == "fixed" and config.fixed_layer is None:
            config.fixed_layer = 0 if on_meta else find_fixed_layer(backbone, task, config)
            decided = {"fixed_layer": config.fixed_layer}
        model = get_peft_model(backbone.model, config)
        if config.guests_of is not None and config.guest_aligner == "linear" and config.mixes and not on_meta:
            decided["aligner_unexplained"] = align_guests(model, training_texts(task), backbone.tokenizer)
        return Built(model, decided)


@method("lora", **settings_of(LoraConfig, *_OF_LORA, "layers_to_transform"))
class Lora(Configured):
    """PEFT's LoRA; with ``match`` its rank is the one whose trainable parameters come nearest to another method's."""

    trains_head: ClassVar[bool] = True

    match: SerializeAsAny[Method] | None = Field(
        None, description="a method; r is chosen, lora_alpha / r stays as it is"
    )

    @field_validator("match", mode="before")
    @classmethod
    def _match(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, Method) else method_from(value)

    def config(self, **of_the_run: Any) -> LoraConfig:
        """The PEFT config with these settings and those that the run adds."""
        config = LoraConfig(**self.model_dump(exclude={"name", "match"}), **of_the_run)
        check_lora(config)
        return config

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The adapted model; with ``match``, the rank and both parameter counts are in ``decided``.

        Raises:
            LamellaError: the head does not learn, and the backbone has none.
        """
        if not self.trains_head:
            require_own_head(backbone, task, self.name)
        if self.match is None:
            with refusals_in_a_sentence(backbone.model):
                return Built(get_peft_model(backbone.model, self._config(backbone, task)))
        target = trainable_parameters(self.match.build(on_meta(backbone), task).model)
        rank = self._rank_for(target, backbone, task)
        model = get_peft_model(backbone.model, self._config(backbone, task, rank))
        decided = {"rank": rank, "matched_parameters": target, "matched_method": self.match.name}
        return Built(model, decided)

    def with_parameters_of(self, other: Method) -> Method:
        """Of a method that is not LoRA itself, where ``match`` names none yet."""
        return self if self.match is not None or isinstance(other, Lora) else self.model_copy(update={"match": other})

    def _rank_for(self, target: int, backbone: Backbone, task: Task) -> int:
        # LoRA's parameters are an affine function of its rank: two counts give them all
        one, two = (
            trainable_parameters(get_peft_model((meta := on_meta(backbone)).model, self._config(meta, task, rank)))
            for rank in (1, 2)
        )
        return max(1, round(1 + (target - one) / (two - one)))

    def _config(self, backbone: Backbone, task: Task, rank: int | None = None) -> LoraConfig:
        config = self.config(**shared(backbone, task, train_head=self.trains_head))
        if rank is not None:
            config.r, config.lora_alpha = rank, config.lora_alpha * rank / config.r
        if config.target_modules is None:
            config.target_modules = usual_lora_targets(backbone.model)
        return config


@method("lora-only")
class LoraOnly(Lora):
    """PEFT's LoRA and nothing else: the task head is the backbone's and stays, as LoRAs to be composed need it."""

    trains_head: ClassVar[bool] = False


@method("prompt-tuning")
class PromptTuning(Method):
    """Trained virtual tokens before the input (PEFT)."""

    num_virtual_tokens: int = Field(20, gt=0, le=MOST, description="PEFT has no default")

    def build(self, backbone: Backbone, task: Task) -> Built:
        """Raises LamellaError for tasks that PEFT's prompt tuning has no model class for."""
        values = shared(backbone, task)
        if values["task_type"] is None:
            raise LamellaError(
                f"Prompt tuning has no form for {task.kind} tasks such as '{task.name}'. Choose lora, mola, molex or "
                "full."
            )
        config = PromptTuningConfig(num_virtual_tokens=self.num_virtual_tokens, **values)
        return Built(get_peft_model(backbone.model, config))


@method("head")
class Head(Method):
    """Only the task head is trained."""

    def build(self, backbone: Backbone, task: Task) -> Built:
        """Raises LamellaError for a language model, which has no task head."""
        if not head_names(backbone.model):
            raise LamellaError(
                f"The method 'head' trains the task head alone, and '{backbone.name}' has none for the task "
                f"'{task.name}' ({task.kind}). Choose lora, mola, molex, prompt-tuning or full."
            )
        return Built(get_peft_model(backbone.model, _without_modules(backbone, task)))


@method("full")
class Full(Method):
    """Every parameter is trained."""

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The backbone itself, all of it trainable."""
        return Built(backbone.model.requires_grad_(True))


@method("bare")
class Bare(Method):
    """Nothing is added and nothing trained: what the others start from, scored as they are."""

    trains: ClassVar[bool] = False

    def build(self, backbone: Backbone, task: Task) -> Built:
        """Raises LamellaError where the backbone has no head for the task."""
        require_own_head(backbone, task, self.name)
        model = get_peft_model(backbone.model, _without_modules(backbone, task, train_head=False))
        return Built(model.requires_grad_(False))


def _without_modules(backbone: Backbone, task: Task, train_head: bool = True) -> LoraConfig:
    """PEFT's name for an adapter without adapted modules: the saved folder is a PEFT folder all the same."""
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, **shared(backbone, task, train_head=train_head))
