"""Composing trained LoRAs in a diffusers pipeline, in its denoiser and in the text encoders that they adapt."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lamella.adapters import LoraSource, map_to, projects, sides_of
from lamella.adapters.source import MODEL, Factors
from lamella.diffusion.composition import Component, PipelineComposition, read_routers
from lamella.diffusion.groups import plan_groups_of
from lamella.diffusion.layers import (
    PipelineConv,
    PipelineLinear,
    PipelineProjection,
    Pointwise,
    SampleGroup,
    is_pointwise,
)
from lamella.errors import LamellaError
from lamella.tuners.model import track
from lamella.tuners.mole.composing import Lora, read_given, refuse_other_configs
from lamella.tuners.mole.config import Adapters, MoleConfig
from lamella.tuners.mole.layer import MoleLinear
from lamella.tuners.mole.model import Composition
from lamella.tuners.mole.plan import Plan, read_sources, refuse_too_few, refuse_too_large

_ADAPTER = "default"
_DENOISERS = ("unet", "transformer")
_COMPONENTS = (*_DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3")
FactorsByModule = dict[str, dict[str, Factors]]
ConstantsByModule = dict[str, dict[str, Tensor]]
# What a composition in a pipeline reads of a MoleConfig.
_READ = (
    "granularity",
    "router_input",
    "score",
    "top_k",
    "temperature",
    "learn_temperature",
    "balance",
    "router_aux_loss_coef",
    "init_lora_weights",
)
_FILLED_IN = ("adapters", "lamella_version")


def compose_pipeline(
    pipe: Any, adapters: Mapping[str, Lora] | Sequence[Lora], config: MoleConfig | None = None
) -> PipelineComposition:
    """Puts trained LoRAs into a diffusers pipeline and routers beside them that weight the LoRAs by their outputs.

    Every model that any of the LoRAs adapts is composed: the UNet or transformer, and the text encoders. All LoRAs
    start with the same weight; only the routers train and are saved. Linear modules and convolutions are composed.

    Args:
        pipe: the pipeline that the LoRAs were made for, without adapters.
        adapters: at least two LoRAs by name: diffusers' or kohya's files, PEFT folders, hub ids, or LoRAs that were
            read already. In a list each is called by its folder or file.
        config: granularity, router_input, score, top_k, temperature and balance; MoleConfig's own where None. With
            ``router_input="token"`` each place of an image and each word weighs the LoRAs for itself, otherwise a
            sample does by the mean of its tokens. The form is "delta".

    Raises:
        LamellaError: fewer than two LoRAs, two of one name, one that cannot be read or does not fit, adapters in the
            pipeline already, or a setting that means nothing here. The pipeline is then as it was.
    """
    refuse_other_configs(config)
    config = MoleConfig() if config is None else copy.deepcopy(config)
    if config.adapters:
        raise LamellaError(f"The config names LoRAs already ({', '.join(config.adapters)}); leave its adapters empty.")
    _models_of(pipe)
    sources = read_given(adapters, pipe)
    config.adapters = {source.name: source for source in sources}
    config.adapters = {name: reference.to_dict() for name, reference in config.references.items()}
    return _inject(pipe, sources, config)


def load_pipeline(pipe: Any, folder: Path | str, adapters: Adapters | None = None) -> PipelineComposition:
    """Puts a saved composition into a pipeline.

    Args:
        pipe: the pipeline it was made for, without adapters.
        folder: of ``PipelineComposition.save``.
        adapters: other places for some of its LoRAs, by name; the digests that were recorded still hold.

    Raises:
        LamellaError: no such folder, a LoRA that is gone or has changed, or routers that do not fit the pipeline, which
            is then as it was.
    """
    folder = Path(folder)
    tensors = read_routers(folder)
    config = MoleConfig.from_pretrained(str(folder), adapters=adapters)
    composition = _inject(pipe, read_sources(config, pipe), config)
    try:
        composition.fill(tensors)
    except LamellaError:
        composition.unload()
        raise
    return composition


def _inject(pipe: Any, sources: Sequence[LoraSource], config: MoleConfig) -> PipelineComposition:
    """Composes LoRAs that were read; the config holds their references."""
    names = tuple(source.name for source in sources)
    refuse_too_few(names)
    refuse_too_large(config.top_k, names)
    _refuse_unread_settings(config)
    models = _models_of(pipe)
    by_component, skipped = _by_component(models, sources)
    plans = {component: _plan(models[component], names, *given, config) for component, given in by_component.items()}
    components = {component: _place(models[component], plan, config) for component, plan in plans.items()}
    return PipelineComposition(pipe, config, names, components, skipped)


def _refuse_unread_settings(config: MoleConfig) -> None:
    """Raises where a setting differs from its default that composing in a pipeline does not read."""
    plain = MoleConfig()
    for field in fields(config):
        is_read = field.name in (*_READ, *_FILLED_IN) and getattr(config, field.name) != "flatten"
        if not is_read and getattr(config, field.name) != getattr(plain, field.name):
            raise LamellaError(
                f"{field.name}={getattr(config, field.name)!r} means nothing in a pipeline; leave it at "
                f"{getattr(plain, field.name)!r}. What counts there: {', '.join(_READ)}."
            )


def _models_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's denoiser and text encoders, by their names in it.

    Raises:
        LamellaError: no pipeline, one without a denoiser, or one that carries adapters already.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise LamellaError(
            f"{type(pipe).__name__} is not a diffusers pipeline. For a transformers model use lamella.compose; "
            "pipelines come with `pip install 'lamella[diffusion]'`."
        )
    models = {name: components[name] for name in _COMPONENTS if isinstance(components.get(name), nn.Module)}
    if not any(name in models for name in _DENOISERS):
        raise LamellaError(f"{type(pipe).__name__} has neither of {' and '.join(_DENOISERS)} to compose LoRAs on.")
    for name, model in models.items():
        layer = next((one for one in model.modules() if isinstance(one, BaseTunerLayer)), None)
        if layer is not None:
            raise LamellaError(
                f"The pipeline's {name} carries adapters already ({', '.join(layer.active_adapters)}). Take them out "
                "first: pipe.unload_lora_weights(), or unload() of the composition."
            )
    return models


def _by_component(
    models: Mapping[str, nn.Module], sources: Sequence[LoraSource]
) -> tuple[dict[str, tuple[FactorsByModule, ConstantsByModule]], list[tuple[str, str]]]:
    """Each component's factors and constants by module and LoRA; and what of the LoRAs is left out, and why.

    A file that names no component is for the denoiser. What base a LoRA names is not compared: a pipeline does not know
    its own name, and LoRAs are used on fine-tuned bases of the same family. Names and shapes of modules must fit.

    Raises:
        LamellaError: a component that the pipeline lacks, or modules that a component lacks or of other shapes.
    """
    denoiser = next(name for name in _DENOISERS if name in models)
    found: dict[str, tuple[FactorsByModule, ConstantsByModule]] = {}
    skipped = [(f"{source.name}: {name}", reason) for source in sources for name, reason in source.skipped]
    for source in sources:
        for component in source.components:
            ours = denoiser if component == MODEL else component
            if ours not in models:
                raise LamellaError(
                    f"{source.described} adapts {component}, which the pipeline does not have: it has "
                    f"{', '.join(models)}. Compose it on a pipeline of the kind that it was trained for."
                )
            factors, constants = found.setdefault(ours, ({}, {}))
            mapped = map_to(models[ours], source, component)
            for module, lora in mapped.modules.items():
                factors.setdefault(module, {})[source.name] = lora
            for module, constant in mapped.constants.items():
                constants.setdefault(module, {})[source.name] = constant
            skipped += [(f"{source.name}: {name}", "the composition uses the model's own") for name in mapped.whole]
    return {component: found[component] for component in models if component in found}, skipped


def _plan(
    model: nn.Module,
    names: tuple[str, ...],
    factors: FactorsByModule,
    constants: ConstantsByModule,
    config: MoleConfig,
) -> Plan:
    modules = {name: module for name, module in model.named_modules() if name in factors or name in constants}
    ranks = {
        name: [len(of[lora].A) if lora in (of := factors.get(name, {})) else 0 for lora in names] for name in modules
    }
    widths = {name: sides_of(module)[1] for name, module in modules.items()}
    silent = {name for name, of in ranks.items() if not any(of)}  # whose LoRAs are constants alone
    alone = {name for name, module in modules.items() if projects(module) and not is_pointwise(module)} | silent
    groups = plan_groups_of(model, list(ranks), config.granularity, config.router_input == "token", alone)
    for group in groups:
        group.inputs = [name for name in group.inputs if name not in silent]
    return Plan(
        names=names, ranks=ranks, widths=widths, factors=factors, constants=constants, heads={}, missed={},
        groups=groups, excluded=set(), skipped=[], notes=[],
    )  # fmt: skip


def _place(model: nn.Module, plan: Plan, config: MoleConfig) -> Component:
    """Puts the layers in place, in the model's order; only routers want a gradient afterwards."""
    trained = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.requires_grad_(False)
    made = Composition(
        plan, _ADAPTER, config, (), lambda one: SampleGroup(one, _ADAPTER, config, plan.names, decoder=False)
    )
    layers: dict[str, MoleLinear] = {}
    for name in plan.ranks:
        module = model.get_submodule(name)
        if is_pointwise(module):
            layer: MoleLinear = PipelineConv(Pointwise(module), name, None)
        else:
            layer = (PipelineProjection if projects(module) else PipelineLinear)(module, name, None)
        layers[name] = made.place(layer, name)
        layers[name].train(model.training)
        model.set_submodule(name, layers[name])
    track(model)
    for group in made.distinct:
        for parameter in group.router.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)
    return Component(model, layers, tuple(made.distinct), trained)
