"""MoLA as a PEFT tuner: which modules get experts, how many, and what is shared between them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import _ExcludedModule
from torch import Tensor, nn

from lamella.backbones import Place, find_place, find_stacks, locate_stacks, rehearse, siblings_with_same_input
from lamella.backbones.offloading import is_offloaded
from lamella.findings import Examination
from lamella.tuners.bypassing import why_unfit
from lamella.tuners.config import wrote_before
from lamella.tuners.model import RoutedModel
from lamella.tuners.mola.allocation import AUTO
from lamella.tuners.mola.config import MolaConfig
from lamella.tuners.mola.layer import MolaLinear
from lamella.tuners.mola.mixture import MolaMixture
from lamella.tuners.mola.needs import heavy_tails, of_one_depth
from lamella.tuners.summary import Summary
from lamella.tuners.targets import (
    Selection,
    check_names,
    check_targets,
    linear_modules,
    usual_lora_targets,
    warn_of_left_out,
)


class MolaModel(RoutedModel):
    """Puts LoRA experts and routers on the linear modules of a model.

    Built by ``get_peft_model(model, MolaConfig(...))``, ``PeftModel.from_pretrained`` or transformers' ``add_adapter``.
    """

    prefix: str = "lamella_mola_"
    lone_tensors = ("lamella_mola_lora_A", "lamella_mola_lora_B", "lamella_mola_start_A", "lamella_mola_start_B")
    tuner_layer_cls = MolaLinear
    method = "MoLA"
    paper = "*Higher Layers Need More LoRA Experts* (arXiv:2402.08562)"
    cannot_merge = (
        "MoLA chooses experts per token, so there is no single weight to merge into the base. Use "
        "lamella.collapse(model, batches) for one plain LoRA with measured error, or lamella.export_experts(model, "
        "folder) for each expert as a LoRA. A trainer that syncs weights by merging (TRL with vLLM) needs the "
        "collapsed LoRA."
    )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Checks the whole request before the first module is touched, injects, and connects the new layers."""
        stacks = find_stacks(model)
        config: MolaConfig = _allocated(self.peft_config[adapter_name], model)
        self.peft_config[adapter_name] = config
        self._allocations = {stack.name: config.allocation(stack.depth) for stack in stacks}
        self._stacks = stacks
        linear = linear_modules(model)
        has_blocks = any(find_place(name, stacks) for name in linear)
        self._why_left_out = _why_left_out(config, has_blocks)
        self._skipped: list[tuple[str, str]] = []
        if config.target_modules is None:
            config.target_modules = usual_lora_targets(model)
        is_named = config.target_modules != "all-linear"
        self._selection = Selection(model, config, stacks, as_saved=wrote_before(config, "0.2"))
        self.seen = rehearse(model, stacks, linear)
        self._unfit = why_unfit(model, self.seen)
        check_names(model, config)
        check_targets(model, config, self._selection, self._unfit, outside=self._why_left_out is None)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if is_named and not self._selection.as_saved:
            warn_of_left_out(self.method, self._skipped)
        else:
            warn_of_left_out(self.method, [one for one in self._skipped if one[0] in self._unfit])
        layers = [layer for layer in _layers(model) if adapter_name in layer.experts]
        self.targeted_module_names[:] = [
            name for name in self.targeted_module_names if name not in {name for name, _ in self._skipped}
        ]
        if self._skipped or config.layers_to_transform is not None:
            config.target_modules = {layer.name for layer in layers}  # PEFT has named all that it would have taken
        _connect(layers, adapter_name)
        self.keep_summary(self._summarise(adapter_name, layers))

    def examine(self, model: nn.Module, run: Callable[[], float], examination: Examination) -> None:
        """Says how far from the base an untrained adapter is that keeps it in the mean alone."""
        for adapter in self.active_adapters:
            layers = [layer for layer in _layers(self.model) if adapter in layer.experts]
            if self.peft_config[adapter].start != "goat" or not all(layer.is_as_started(adapter) for layer in layers):
                continue
            shares = _shares_added(layers, run)
            if not shares:  # the batch goes past them
                continue
            worst = max(shares, key=shares.__getitem__)
            examination.saw(
                f"start of adapter {adapter!r}: before training, what its modules put out is "
                f"{sum(shares.values()) / len(shares):.2%} off the base's in the mean, at most {shares[worst]:.2%} "
                f"({worst}); init_lora_weights='svd' starts at the base exactly"
            )

    def lora_mixture(self, adapter_name: str) -> MolaMixture:
        return MolaMixture(self.model, adapter_name, self.peft_config[adapter_name])

    def _check_target_module_exists(self, peft_config: MolaConfig, key: str) -> bool | _ExcludedModule:
        return self._selection(key)

    def _create_and_replace(
        self,
        peft_config: MolaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        place = find_place(current_key, self._stacks) or Place("", 0, current_key)
        has_no_effect = current_key in self._unfit
        if has_no_effect and not self._selection.as_saved:
            self._skipped.append((current_key, self._unfit[current_key]))
            return
        if not place.stack and self._why_left_out is not None:
            self._skipped.append((current_key, self._why_left_out))
            return
        # Outside the blocks there is one number of experts for all.
        experts, top_k, _ = self._allocations[place.stack] if place.stack else peft_config.allocation(1)
        layer = target if isinstance(target, MolaLinear) else MolaLinear(target, place)
        layer.is_watched = not has_no_effect
        layer.update_layer(adapter_name, peft_config, experts[place.layer], top_k[place.layer])
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _summarise(self, adapter_name: str, layers: list[MolaLinear]) -> Summary:
        config = self.peft_config[adapter_name]
        modules = {stack.name: [0] * stack.depth for stack in self._stacks}
        outside = [layer.name for layer in layers if not layer.place.stack]
        for layer in layers:
            if layer.place.stack:
                modules[layer.place.stack][layer.place.layer] += 1
        notes = [f"{stack.name}: {note}" for stack in self._stacks for note in self._allocations[stack.name][2]]
        if config.start == "goat":
            notes.append(
                "init_lora_weights='goat' keeps the base in the mean over experts alone; preflight says how far"
            )
        if outside:
            notes.append(f"outside the blocks, with {config.num_experts} experts each: {', '.join(outside)}")
        return Summary(
            method=f"MoLA r={config.r}",
            adapter=adapter_name,
            stacks=tuple(self._stacks),
            experts={stack.name: self._allocations[stack.name][0] for stack in self._stacks},
            top_k={stack.name: self._allocations[stack.name][1] for stack in self._stacks},
            modules=modules,
            skipped=tuple(self._skipped),
            notes=tuple(notes),
            trainable=sum(p.numel() for layer in layers for p in _adapter_parameters(layer, adapter_name)),
        )


def _allocated(config: MolaConfig, model: nn.Module) -> MolaConfig:
    """The config with the experts of each block that "auto" stands for, so that what is saved says them; else itself.

    Where weights have no numbers, to be counted alone, all blocks have as many.
    """
    if config.num_experts != AUTO:
        return config
    if all(p.is_meta for p in model.parameters()) and not any(map(is_offloaded, model.modules())):
        needs = of_one_depth({stack.name: [1.0] * stack.depth for stack in locate_stacks(model)})
    else:
        needs = of_one_depth(heavy_tails(model))
    found = copy.copy(config)
    found.num_experts, found.top_k, _ = config.allocation(len(needs), needs)
    found.expert_budget = None
    return found


def _why_left_out(config: MolaConfig, has_blocks: bool) -> str | None:
    """Why modules outside the blocks have no experts; None where they do: they are named, or no block has any."""
    if has_blocks and (config.target_modules == "all-linear" or wrote_before(config, "0.2")):
        return "outside the blocks, so it belongs to no layer; name it in target_modules to adapt it"
    for name in ("num_experts", "top_k"):
        if not isinstance(value := getattr(config, name), int):
            return f"outside the blocks, and {name}={value!r} counts by block"
    return None


def _layers(model: nn.Module) -> list[MolaLinear]:
    return [module for module in model.modules() if isinstance(module, MolaLinear)]


def _shares_added(layers: list[MolaLinear], run: Callable[[], float]) -> dict[str, float]:
    """The norm of what is added to each layer's output in a run, over the norm of that output, by name."""
    shares: dict[str, float] = {}

    def compare(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, MolaLinear)
        base = layer.base_layer(*args)
        shares[layer.name] = float((output - base).norm() / base.norm().clamp_min(torch.finfo(base.dtype).tiny))

    hooks = [layer.register_forward_hook(compare) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return shares


def _adapter_parameters(layer: MolaLinear, adapter: str) -> list[nn.Parameter]:
    router = layer.lamella_mola_router[adapter].parameters() if layer.routed(adapter) else ()
    return [*layer.factors(adapter), *router]


def _connect(layers: list[MolaLinear], adapter: str) -> None:
    """Tells each layer its share of its block's balance loss and which layers are given the same input."""
    by_place = {layer.place: layer for layer in layers}
    routers: dict[tuple[str, int], int] = {}
    for layer in layers:
        block = (layer.place.stack, layer.place.layer)
        routers[block] = routers.get(block, 0) + layer.routed(adapter)
    for layer in layers:
        place = layer.place
        layer.balance_share[adapter] = 1 / max(routers[place.stack, place.layer], 1)
        names = siblings_with_same_input(place)
        siblings = [by_place.get(Place(place.stack, place.layer, name)) for name in names]
        same = [s for s in siblings if s is not None and s.in_features == layer.in_features]
        if len(same) > len(layer.same_input):
            layer.same_input = same
