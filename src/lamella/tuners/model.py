"""What all of lamella's methods share as PEFT tuners: summaries, strict loading, and what a routed model refuses."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from lamella.backbones import Rehearsal, find_blocks
from lamella.errors import CannotMergeError, LamellaError
from lamella.findings import Examination
from lamella.routing import CallTracker, track_calls, untrack_calls
from lamella.tuners.bypassing import leave_fast_paths
from lamella.tuners.cache import DecisionsInCache
from lamella.tuners.loading import check_tensors
from lamella.tuners.loss_scale import scale_of_trainer, watch_trainer
from lamella.tuners.routed import LoraMixture
from lamella.tuners.summary import Summary
from lamella.tuners.tensors import LostGradients, placed, say_if_rounded, with_numbers

logger = logging.getLogger(__name__)

# Tasks whose answer is about the whole input; nothing in it is to be predicted from what stands before.
_ABOUT_ALL = frozenset({"ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"})


def _refuse_name(adapter: Any) -> None:
    """Raises unless an adapter can be called so: the name becomes a part of its tensors' names."""
    if not isinstance(adapter, str) or not adapter or "." in adapter or hasattr(nn.ModuleDict, adapter):
        raise LamellaError(
            f"An adapter cannot be called {adapter!r}: the name becomes a part of its tensors' names, so that it has "
            "no dots and is none of the words that torch keeps for itself. Call it otherwise, as in 'v1_0'."
        )


class Configs(dict[str, PeftConfig]):
    """The configs of a model's adapters, by name; PEFT would let another method's take a name that is given."""

    def __setitem__(self, adapter: str, config: PeftConfig) -> None:
        if adapter in self:
            refuse_name_of(adapter, self[adapter], config)
        super().__setitem__(adapter, config)

    def update(self, others: Mapping[str, PeftConfig]) -> None:  # type: ignore[override]
        """Adds some, or takes others of the same methods."""
        for adapter, config in others.items():
            self[adapter] = config


def refuse_name_of(adapter: str, present: PeftConfig, config: PeftConfig) -> None:
    """Raises where an adapter of another method has the name, whose config would be replaced without a word."""
    if present.peft_type != config.peft_type:
        raise LamellaError(
            f"The model already has an adapter called {adapter!r}, of the type {present.peft_type.value}. Give the one "
            f"of the type {config.peft_type.value} another name: get_peft_model(model, config, adapter_name=...)."
        )


def _refuse_second(model: nn.Module, given: PeftConfig | Mapping[str, PeftConfig], adapter: str) -> None:
    """The same for configs that another package keeps."""
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return  # it had adapters once
    present = getattr(model, "peft_config", {}).get(adapter)
    if present is not None:
        refuse_name_of(adapter, present, given if isinstance(given, PeftConfig) else given[adapter])


def _refuse_task(model: nn.Module, task: Any) -> None:
    """Raises where PEFT would wrap a model for a task that generates, and the model cannot."""
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise LamellaError(
            f"task_type={str(getattr(task, 'value', task))!r} is for models that generate, and {type(model).__name__} "
            "does not. Correct task_type, or leave it out."
        )


@contextmanager
def refusals_in_a_sentence(model: nn.Module) -> Iterator[None]:
    """What PEFT refuses as settings for a model is a `LamellaError`."""
    try:
        yield
    except LamellaError:
        raise
    except ValueError as error:
        said = str(error).split("\n")[0].rstrip(".")
        raise LamellaError(f"The adapter cannot be put on {type(model).__name__}: {said}.") from error


def _of_base(model: nn.Module, config: Any) -> Any:
    """The config, by which an adapter of a model with fewer experts knows that model; the caller's stays as it is.

    Raises:
        LamellaError: the adapter was trained on another smaller model, or on one while this is the whole one.
    """
    here = getattr(getattr(model, "config", None), "lamella_compressed", None)
    known = getattr(config, "base_experts", None)
    if known is not None and known != here:
        raise LamellaError(
            f"The adapter was trained on a model with {known}, and this {type(model).__name__} "
            + ("has all its experts" if here is None else f"has {here}")
            + ". Tensors of the same shapes would load and answer otherwise; load it on the model it was trained on."
        )
    if known == here:
        return config
    own = copy.copy(config)
    own.base_experts = here
    return own


class RoutedModel(BaseTuner):
    """A tuner whose layers decide by their input, so that none can be merged and every tensor must be there.

    A method sets what it is called, why it cannot be merged, and what to do instead of an adapter per row. Its layers
    answer `lamella.tuners.routed.RoutedModule`; what only it can say, it says in the methods below.
    """

    peft_config: dict[str, Any]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    method: ClassVar[str]
    paper: ClassVar[str] = ""  # what a model card names as the method's origin
    cannot_merge: ClassVar[str]
    no_lora_mixture: ClassVar[str] = "The experts of this adapter are not LoRAs that lie side by side."
    instead_of_adapter_names: ClassVar[str] = "Call the model once for each."
    instead_of_weighted_adapters: ClassVar[str] = (
        "Weigh trained LoRAs with lamella.compose, or turn each adapter into a plain LoRA with lamella.collapse and "
        "add up those."
    )
    seen: Rehearsal = Rehearsal()  # what a forward of a few tokens has shown of the model
    lone_tensors: ClassVar[tuple[str, ...]] = ()  # of `AdapterTensors`, which a file calls so
    also_loaded_strictly: ClassVar[
        tuple[str, ...]
    ] = ()  # prefixes beside the method's own of tensors that must be there

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, PeftModel):
            raise LamellaError(
                f"The model is a PeftModel already, with the adapter {model.active_adapter!r}. Put another one of the "
                "same method beside it with model.add_adapter(name, config), or begin with the bare model, which "
                "model.unload() gives back."
            )
        _refuse_second(model, peft_config, adapter_name)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        if set(self.peft_config) == {adapter_name}:  # the first: others share its configs, as PEFT has them
            self.peft_config = Configs(self.peft_config)
            model.peft_config = self.peft_config  # type: ignore[assignment]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _refuse_name(adapter_name)
        _refuse_task(model, self.peft_config[adapter_name].task_type)
        self.peft_config[adapter_name] = _of_base(model, self.peft_config[adapter_name])
        with refusals_in_a_sentence(model), placed(model):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        leave_fast_paths(model)
        track(model).turned.update(self.seen.turned)
        if any(parameter.requires_grad for parameter in model.parameters()):
            watch_trainer()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT merges LoRAs by this; whoever looks for it here is told what there is instead."""
        raise LamellaError(
            f"{self.method} adapters cannot be added up into one (add_weighted_adapter): each decides by its input. "
            f"{self.instead_of_weighted_adapters}"
        )

    def lora_mixture(self, adapter_name: str) -> LoraMixture:
        """An adapter's LoRAs and their weights, for `lamella.collapse` and `lamella.export_experts`.

        Raises:
            LamellaError: the method has none, or no plain LoRA can do the same.
        """
        raise LamellaError(self.no_lora_mixture)

    def alphas(self, adapter_name: str | None = None) -> dict[str, float]:
        """Learned weights of a block against what is mixed into it, by name; empty where none is learned."""
        return {}

    def examine(self, model: nn.Module, run: Callable[[], float], examination: Examination) -> None:
        """Checks that doctor and preflight make for this method alone.

        Args:
            model: the PeftModel, in evaluation mode, without gradients and restored afterwards.
            run: runs it on one batch and returns the loss.
            examination: takes the findings.
        """

    @property
    def summaries(self) -> dict[str, Summary]:
        """What each injection did, by adapter name."""
        return self.__dict__.setdefault("_summaries", {})

    def summary(self, adapter_name: str | None = None) -> Summary | None:
        """What the injection of an adapter did, None where its method keeps no account of it.

        Of the first active adapter when no name is given.
        """
        return self.summaries.get(adapter_name or self.active_adapters[0])

    def keep_summary(self, summary: Summary) -> None:
        """Keeps what an injection did, and logs it: ``add_adapter`` leaves no tuner behind to ask."""
        self.summaries[summary.adapter] = summary
        logger.info("%s", summary)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Without the weight that PEFT copies where a head of several layers, which has none, was trained whole."""
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        untrack_calls(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT asks here whether rows of a batch may use different adapters; unanswered, it drops the wish."""
        if kwargs.get("adapter_names") is not None:
            raise LamellaError(
                f"{self.method} cannot use a different adapter per row of a batch (adapter_names). "
                f"{self.instead_of_adapter_names}"
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise CannotMergeError(self.cannot_merge)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return with_numbers(model, super()._get_adapter_state_dict(model, *args, **kwargs))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        name: str = super()._remove_adapter_name_from_key(key, adapter_name)
        container = name.removesuffix(".weight")
        return container if container.endswith(cls.lone_tensors) else name

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(model, (cls.prefix, *cls.also_loaded_strictly), adapter_name, tensors)
        say_if_rounded(model)
        # Loaded without copying, a tensor lies in memory as in the file, and one that is not aligned is multiplied in
        # another order: the same numbers would give other last digits.
        own = tuple(f".{prefix}" for prefix in (cls.prefix, *cls.also_loaded_strictly))
        return {n: tensor.clone() if any(part in n for part in own) else tensor for n, tensor in tensors.items()}


def track(model: nn.Module) -> CallTracker:
    """Sets the hooks of ``lamella.routing.track_calls`` on a model and the transformers inside it, once."""
    # The transformers inside are given attention masks of their own: an encoder's, a decoder's.
    stacks = [m for m in model.modules() if m is not model and isinstance(m, PreTrainedModel)]
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    loss_type = getattr(model, "loss_type", None) or ""
    shifts_labels = LOSS_MAPPING.get(loss_type) is ForCausalLMLoss and not is_encoder_decoder
    about_all = loss_type in _ABOUT_ALL
    tracker = track_calls(model, stacks, shifts_labels, whole_input=about_all, blocks=find_blocks(model))
    tracker.trainers_scale = scale_of_trainer
    if not tracker.listeners:
        tracker.listeners += [DecisionsInCache(), LostGradients(model)]
    return tracker
