"""MoLEx as a PEFT tuner: wraps whole blocks, with LoRA inside them, and shares routers between them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule
from torch import Tensor, nn

from lamella.backbones import Place, Stack, locate_stacks, width_of
from lamella.backbones.offloading import execution_device
from lamella.errors import LamellaError
from lamella.findings import Examination
from lamella.tuners.model import RoutedModel, refusals_in_a_sentence
from lamella.tuners.molex.block import CANNOT_MERGE, MolexBlock
from lamella.tuners.molex.checks import examine_guests
from lamella.tuners.molex.config import MolexConfig
from lamella.tuners.molex.inner_lora import find_targets, inject_lora, lora_layers
from lamella.tuners.molex.plan import make_plans
from lamella.tuners.molex.second_model import load_second_model
from lamella.tuners.molex.summarising import summarise
from lamella.tuners.tensors import is_meta, placed


class MolexModel(RoutedModel):
    """Wraps the blocks of a model so that each can mix in another, and puts LoRA inside them.

    Built by ``get_peft_model(model, MolexConfig(...))``, ``PeftModel.from_pretrained`` or transformers'
    ``add_adapter``.
    """

    prefix: str = "lamella_molex_"
    tuner_layer_cls = BaseTunerLayer  # the blocks, and the LoRA layers inside them: all belong to this tuner
    method = "MoLEx"
    paper = "*MoLEx: Mixture of Layer Experts for Finetuning with Sparse Upcycling* (arXiv:2503.11144)"
    cannot_merge = CANNOT_MERGE
    no_lora_mixture = (
        "MoLEx lets each sequence choose the blocks it runs through, so neither one plain LoRA nor one per expert does "
        "the same: lamella.collapse and lamella.export_experts are for MoLA and MOLE. Serve it with PEFT as it is, or "
        "train with policy='self', which is plain LoRA."
    )
    lone_tensors = ("lamella_molex_alpha",)
    also_loaded_strictly = ("lora_",)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Checks the whole request before the first module is touched, then injects LoRA and wraps the blocks."""
        config: MolexConfig = self.peft_config[adapter_name]
        with refusals_in_a_sentence(model), _bare_blocks(model):
            self._stacks = locate_stacks(model)
            second = None
            if config.guests_of is not None and config.mixes:
                second, digest = load_second_model(config, model, self._stacks)
                config = self.peft_config[adapter_name] = replace(config, guests_sha256=digest)
            self._plans = make_plans(model, config, self._stacks, len(second or ()))
            inside, outside = ([], []) if config.lora is None else find_targets(model, config, self._stacks)
            self._blocks = {stack.name: list(model.get_submodule(stack.name).children()) for stack in self._stacks}
            if config.lora is not None:
                with placed(model):  # not around the rehearsal of a forward, after which accelerate takes weights out
                    inject_lora(model, config, adapter_name, inside, self.active_adapters, low_cpu_mem_usage)
        self._depths = {
            f"{plan.stack.name}.{depth.index}": (plan.stack, depth) for plan in self._plans for depth in plan.depths
        }
        self._seconds = [] if second is None else [second]  # no module of the tuner itself
        self._excluded = {name for plan in self._plans for name, _ in plan.skipped}
        self._holders: dict[tuple[str, str], MolexBlock] = {}
        # How the config's modules are matched is settled here; a file's names say no more.
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        self.keep_summary(summarise(model, adapter_name, config, self._plans, inside, outside, second))

    @torch.no_grad()
    def alphas(self, adapter_name: str | None = None) -> dict[str, float]:
        """The learned alphas of an adapter as they are now, between 0 and 1; of the first active one without a name.

        By the name of what each belongs to: a stack whose blocks share it, or a block. Empty where alpha is fixed.
        """
        adapter = adapter_name or self.active_adapters[0]
        is_shared = self.peft_config[adapter].alpha_scope == "shared"
        holders = [block for _, _, block in _wrapped(self.model) if adapter in block.lamella_molex_alpha]
        return {block.place.stack if is_shared else block.name: float(block.alpha(adapter)) for block in holders}

    def examine(self, model: nn.Module, run: Callable[[], float], examination: Examination) -> None:
        """Compares what guests add with what their hosts do."""
        config: MolexConfig = self.peft_config[self.active_adapters[0]]
        if not config.mixes and config.lora is None:
            examination.warning(
                "adds-nothing",
                f"policy={config.policy!r} and alpha={config.alpha:g} mix no guest in, and there is no LoRA",
                f"adapter {self.active_adapters[0]!r}",
                "the blocks do what the base's do",
                "lower alpha, let a router choose, or give lora=LoraConfig(...)",
            )
        examine_guests(model, [block for _, _, block in _wrapped(self.model)], run, examination)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates one adapter.

        Raises:
            LamellaError: several, each of which would put another block in the same place.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise LamellaError(
                f"MoLEx runs one adapter at a time, not {', '.join(adapter_name)} together: each would put another "
                "block in the same place."
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _prepare_adapter_config(self, peft_config: MolexConfig, model_config: dict[str, Any]) -> MolexConfig:
        return peft_config  # there are no target_modules to fill in

    def _check_target_module_exists(self, peft_config: MolexConfig, key: str) -> bool | _ExcludedModule:
        # An excluded block is told from one that was never meant, or PEFT warns that nothing was excluded.
        return _ExcludedModule() if key in self._excluded else key in self._depths

    def _create_and_replace(
        self,
        peft_config: MolexConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        stack, depth = self._depths[current_key]
        block = target
        if not isinstance(block, MolexBlock):
            place = Place(stack.name, depth.index, "block")
            block = MolexBlock(target, place, self._blocks[stack.name], stack.causal, self._is_after_encoder(stack))
            setattr(parent, target_name, block)
        router_at = self._holder("router", peft_config.router_scope, stack, block) if depth.routes else None
        learns_alpha = depth.mixes and peft_config.alpha_mode == "learned"
        alpha_at = self._holder("alpha", peft_config.alpha_scope, stack, block) if learns_alpha else None
        seconds = [(self._holder("guests", "shared", stack, block), one) for one in self._seconds if depth.mixes]
        width = width_of(self.model, stack.name)
        block.update_layer(adapter_name, peft_config, depth, width, router_at, alpha_at, *seconds)
        if adapter_name not in self.active_adapters:
            for held in (block.lamella_molex_router, block.lamella_molex_alpha, block.lamella_molex_guests):
                if adapter_name in held:
                    held[adapter_name].requires_grad_(False)

    def _holder(self, what: str, scope: str, stack: Stack, block: MolexBlock) -> MolexBlock:
        """The block that holds what a stack shares: the first one that needs it."""
        return block if scope == "per-layer" else self._holders.setdefault((stack.name, what), block)

    def _is_after_encoder(self, stack: Stack) -> bool:
        return stack.causal and bool(self.get_model_config(self.model).get("is_encoder_decoder", False))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MolexConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        for layer in lora_layers(model):
            awaits = adapter_name in layer.lora_A and is_meta(layer.lora_A[adapter_name])
            if awaits and execution_device(layer.get_base_layer()) is not None:
                raise LamellaError(
                    "PEFT would put the LoRA inside the blocks where accelerate keeps their offloaded weights, without "
                    "numbers. Load the adapter without low_cpu_mem_usage."
                )
        tensors: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return tensors

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for parent, name, block in _wrapped(self.model):
            setattr(parent, name, block.base_layer)
        unloaded: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        return unloaded


def _wrapped(model: nn.Module) -> list[tuple[nn.Module, str, MolexBlock]]:
    """The wrapped blocks, each with what holds it and its name there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, MolexBlock)
    ]


@contextmanager
def _bare_blocks(model: nn.Module) -> Iterator[None]:
    """Takes the wrappers off for a while, so that modules have the names that LoRA knows them by."""
    wrapped = _wrapped(model)
    for parent, name, block in wrapped:
        setattr(parent, name, block.base_layer)
    try:
        yield
    finally:
        for parent, name, block in wrapped:
            setattr(parent, name, block)
