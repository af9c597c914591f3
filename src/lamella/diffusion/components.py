"""Which models of a pipeline LoRAs are for, and which of a LoRA's factors belong to which."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lamella.adapters import LoraSource, map_to
from lamella.adapters.source import MODEL, Factors
from lamella.errors import LamellaError

DENOISERS = ("unet", "transformer")
COMPONENTS = (*DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3")

FactorsByModule = dict[str, dict[str, Factors]]


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's denoiser and text encoders, by their names in it.

    Raises:
        LamellaError: no pipeline, one without a denoiser, or one that carries adapters already.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise LamellaError(
            f"{type(pipe).__name__} is no diffusers pipeline. For a transformers model use lamella.compose; pipelines "
            "come with `pip install 'lamella[diffusion]'`."
        )
    models = {name: components[name] for name in COMPONENTS if isinstance(components.get(name), nn.Module)}
    if not any(name in models for name in DENOISERS):
        raise LamellaError(f"{type(pipe).__name__} has neither of {' and '.join(DENOISERS)} to compose LoRAs on.")
    for name, model in models.items():
        layer = next((own for own in model.modules() if isinstance(own, BaseTunerLayer)), None)
        if layer is not None:
            raise LamellaError(
                f"The pipeline's {name} carries adapters already ({', '.join(layer.active_adapters)}). Take them out "
                "first: pipe.unload_lora_weights(), or unload() of the composition."
            )
    return models


def factors_by_component(models: Mapping[str, nn.Module], sources: Sequence[LoraSource]) -> dict[str, FactorsByModule]:
    """Each component's factors by module, in the model's order, and LoRA; without components that no LoRA adapts.

    A file that names no component is for the denoiser. What base a LoRA names is not compared: a pipeline does not know
    its own name, and LoRAs are used on fine-tuned bases of the same family. Names and shapes of modules must fit.

    Raises:
        LamellaError: a component that the pipeline lacks, or modules that a component lacks or of other shapes.
    """
    denoiser = next(name for name in DENOISERS if name in models)
    found: dict[str, FactorsByModule] = {}
    for source in sources:
        for component in source.components:
            ours = denoiser if component == MODEL else component
            if ours not in models:
                raise LamellaError(
                    f"{source.described} adapts {component}, which the pipeline does not have: it has "
                    f"{', '.join(models)}. Compose it on a pipeline of the kind that it was trained for."
                )
            for module, factors in map_to(models[ours], source, component).modules.items():
                found.setdefault(ours, {}).setdefault(module, {})[source.name] = factors
    return {
        component: {name: found[component][name] for name, _ in model.named_modules() if name in found[component]}
        for component, model in models.items()
        if component in found
    }
