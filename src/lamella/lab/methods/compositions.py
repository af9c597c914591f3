"""What all methods over trained LoRAs share: reading them, putting factors on a backbone, and what registers one.

A composition is a function from LoRAs to one LoRA, or to a model; its parameters are its settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from safetensors.torch import save_file
from torch import nn

from lamella.adapters import Factors, check_base, map_to, read_lora
from lamella.errors import LamellaError
from lamella.files import read_tensors
from lamella.lab.methods.base import Built, Method, method, require_own_head, shared

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task

# a LoRA on a model: factors by module
Modules = dict[str, Factors]
Loras = dict[str, Modules]


@dataclass(frozen=True)
class Target:
    """What LoRAs are composed for: a backbone, whose head stays as it is, and the task that they shall serve."""

    backbone: Backbone
    task: Task

    def with_lora(self, modules: Modules) -> PeftModel:
        """The backbone with one frozen LoRA of these factors."""
        return as_loras(self.backbone, self.task, {"default": modules})

    def with_loras(self, loras: Mapping[str, Modules]) -> PeftModel:
        """The backbone with frozen LoRAs, by names that PEFT can use, the first of them active."""
        return as_loras(self.backbone, self.task, loras)


class ComposingMethod(Method):
    """Settings of a method over trained LoRAs. The LoRAs stay as they are, and so does the backbone's task head."""

    # how one of the LoRAs is left out afterwards: its routers share its weight out, or the rest is put together anew
    masked_by: ClassVar[Literal["routers", "rebuilding"] | None] = None

    adapters: dict[str, str] = Field(
        min_length=1, description="by any name: a PEFT folder, a run, a LoRA file or a hub id"
    )

    def loras(self, backbone: Backbone, task: Task) -> Loras:
        """The LoRAs by name, on this backbone.

        Raises:
            LamellaError: one cannot be read or belongs to another base, or the backbone's head is a new one.
        """
        require_own_head(backbone, task, self.name)
        return read_loras(backbone, self.adapters)


class RebuiltMethod(ComposingMethod):
    """A composition that PEFT cannot load: it is built anew from its LoRAs, and what it trained is put in.

    An interrupted run begins anew.
    """

    resumes: ClassVar[bool] = False

    def save(self, model: PeftModel, folder: Path) -> None:
        """PEFT's files, of which the one of tensors holds what was trained."""
        super().save(model, folder)
        trained = {
            name: tensor.detach().contiguous() for name, tensor in model.named_parameters() if tensor.requires_grad
        }
        save_file(trained, folder / "adapter_model.safetensors")

    def load(self, backbone: Backbone, task: Task, folder: Path) -> nn.Module:
        """Built anew with the saved tensors."""
        model = self.build(backbone, task).model
        saved = read_tensors(folder / "adapter_model.safetensors")
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if saved.keys() != wanted:
            raise LamellaError(
                f"{folder} is not a composition of the kind '{self.name}' that lamella saved: "
                f"{sorted(saved.keys() ^ wanted)[0]} is missing or unknown."
            )
        model.load_state_dict(saved, strict=False)
        return model


class _Composed(ComposingMethod):
    """A composition that is a function."""

    function: ClassVar[Callable[..., Modules | Built]]
    parameters: ClassVar[frozenset[str]]
    loads: ClassVar[bool]

    def build(self, backbone: Backbone, task: Task) -> Built:
        """What the function makes of the LoRAs and these settings."""
        target = Target(backbone, task)
        given = {"loras": self.loras(backbone, task), "target": target}
        values = {name: given[name] if name in given else getattr(self, name) for name in self.parameters}
        made = type(self).function(**values)
        return made if isinstance(made, Built) else Built(target.with_lora(made))

    def load(self, backbone: Backbone, task: Task, folder: Path) -> nn.Module:
        """What was saved; built anew where PEFT cannot load it."""
        return super().load(backbone, task, folder) if self.loads else self.build(backbone, task).model


def composition(
    name: str, *, trains: bool = False, loads: bool = True
) -> Callable[[Callable[..., Modules | Built]], type[ComposingMethod]]:
    """Register a function of `Loras` as a method: ``@composition("mean") def mean(loras): return weighted_sum(...)``.

    The function returns one LoRA, which is put on the backbone, frozen; or what it `Built`. Its parameter ``target``,
    if it has one, is given the `Target`; all others but ``loras`` are the settings that a recipe can give, with their
    types and defaults.

    Args:
        name: what recipes call it.
        trains: whether what it builds is trained; if not, a LoRA can be left out by composing the rest.
        loads: whether PEFT can load what it saves; if not, it is built anew, and nothing in it may train.
    """

    def register(function: Callable[..., Modules | Built]) -> type[ComposingMethod]:
        hints = get_type_hints(function, include_extras=True)
        parameters = signature(function).parameters
        settings = {
            key: (hints[key], ... if parameter.default is Parameter.empty else parameter.default)
            for key, parameter in parameters.items()
            if key not in ("loras", "target")
        }
        described = {
            "__doc__": function.__doc__,
            "__module__": function.__module__,
            "function": staticmethod(function),
            "parameters": frozenset(parameters),
            "loads": loads,
            "trains": trains,
            "masked_by": None if trains else "rebuilding",
        }
        return method(name, **settings)(type(function.__name__, (_Composed,), described))

    return register


def read_loras(backbone: Backbone, adapters: Mapping[str, str]) -> Loras:
    """LoRAs by name, each with the backbone's module names.

    Raises:
        LamellaError: one cannot be read, or does not fit the backbone.
    """
    loras: Loras = {}
    for name, place in adapters.items():
        source = read_lora(lora_folder(place), name=name)
        check_base(backbone.model, source)
        mapped = map_to(backbone.model, source)
        odd = [module for module, one in mapped.modules.items() if type(one) is not Factors or one.A.dim() != 2]
        odd += mapped.constants
        if odd:
            raise LamellaError(
                f"{source.described} adapts more than linear maps, first {odd[0]}: an embedding, a convolution or a "
                "bias, which these compositions do not add up. lamella.compose mixes them."
            )
        loras[name] = mapped.modules
    return loras


def lora_folder(place: str) -> str:
    """Where the LoRA of a run lies; any other place is the LoRA's folder itself."""
    run = Path(place)
    return str(run / "adapter") if (run / "run.yaml").is_file() else place


def as_loras(backbone: Backbone, task: Task, loras: Mapping[str, Modules]) -> PeftModel:
    """The backbone with frozen LoRAs as PEFT's adapters, the first of them active; its head is the backbone's.

    Args:
        loras: by names that PEFT can use, without dots.
    """
    first, *others = loras
    config = lora_config(loras[first], **shared(backbone, task, train_head=False))
    model: PeftModel = get_peft_model(backbone.model, config, adapter_name=first)
    for name in others:
        model.add_adapter(name, lora_config(loras[name]))
    for name, modules in loras.items():
        fill(backbone.model, name, modules)
    return model


def lora_config(modules: Modules, **values: Any) -> LoraConfig:
    """PEFT's config of a LoRA with these factors, to be used as it is."""
    ranks = {name: len(factors.A) for name, factors in modules.items()}
    alphas = {name: factors.scaling * ranks[name] for name, factors in modules.items()}
    first = next(iter(modules))
    return LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        rank_pattern={name: rank for name, rank in ranks.items() if rank != ranks[first]},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        target_modules=list(modules),
        inference_mode=True,
        **values,
    )


def fill(bare: nn.Module, adapter: str, modules: Modules) -> None:
    """Puts factors into an adapter of the same modules and ranks; ``bare`` is the model without PEFT's wrapping."""
    with torch.no_grad():
        for name, factors in modules.items():
            layer: Any = bare.get_submodule(name)
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            for weight, value in ((down, factors.A), (up, factors.B)):
                weight.copy_(value.view_as(weight))
