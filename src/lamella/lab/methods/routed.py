"""Compositions whose weights depend on the input: MOLE, a softmax of the hidden state, and PEFT's Arrow and X-LoRA."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from peft.tuners.lora.config import ArrowConfig
from pydantic import Field
from safetensors.torch import save_file

from lamella.errors import LamellaError
from lamella.lab.methods.base import Built, Configured, method, require_own_head, settings_of, shared
from lamella.lab.methods.compositions import (
    ComposingMethod,
    Loras,
    Modules,
    RebuiltMethod,
    Target,
    composition,
    fill,
    lora_config,
    lora_folder,
)
from lamella.tuners.mola import MolaConfig, MolaLinear
from lamella.tuners.mole import MoleConfig, compose

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task

_ARROW = "arrow_router"  # the one name that PEFT's Arrow does not take for a LoRA

Temperature = Annotated[float, Field(gt=0.0)]


@method("mole", **settings_of(MoleConfig, without={"adapters", "embedded", "target_modules"}))
class Mole(Configured, ComposingMethod):
    """Trained LoRAs mixed by routers that read their outputs; the keys are those of `lamella.MoleConfig`."""

    masked_by: ClassVar[Literal["routers"]] = "routers"

    train_head: bool = Field(True, description="whether the task head learns too; else it is the backbone's")

    @property
    def is_mixture(self) -> bool:
        return True

    def config(self, **of_the_run: Any) -> MoleConfig:
        """The config of these settings, without the LoRAs."""
        return MoleConfig(**self.model_dump(exclude={"name", "adapters", "train_head"}), **of_the_run)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The composition; what was read, mapped and skipped is in the model's summary.

        Raises:
            LamellaError: LoRAs that cannot be composed here, or a head that is neither trained nor the backbone's.
        """
        if not self.train_head:
            require_own_head(backbone, task, self.name)
        config = self.config(**shared(backbone, task, train_head=self.train_head))
        places = {name: lora_folder(place) for name, place in self.adapters.items()}
        return Built(compose(backbone.model, places, config))


@composition("hidden-routing", trains=True)
def hidden_routing(
    loras: Loras, target: Target, router_aux_loss_coef: float = MolaConfig.router_aux_loss_coef
) -> Built:
    """In each adapted matrix a softmax over all LoRAs for every token, from the matrix's input.

    It is MoLA with the trained LoRAs as frozen experts, all of them chosen, and routers that start even, so that the
    mixture starts as the mean of the LoRAs' deltas; the routers alone train. A LoRA with a lower rank, or without
    factors in a module, is filled up with zeros. MOLE's routers, which read the LoRAs' outputs, are compared with it.
    """
    experts = list(loras.values())
    rank = max(len(factors.A) for modules in experts for factors in modules.values())
    targets = list(dict.fromkeys(module for modules in experts for module in modules))
    config = MolaConfig(
        r=rank,
        lora_alpha=rank,
        num_experts=len(experts),
        top_k=len(experts),
        router_aux_loss_coef=router_aux_loss_coef,
        target_modules=targets,
        **shared(target.backbone, target.task, train_head=False),
    )
    model = get_peft_model(target.backbone.model, config)
    for module in targets:
        layer = model.get_base_model().get_submodule(module)
        assert isinstance(layer, MolaLinear)
        _freeze_experts(layer, module, experts)
    return Built(model)


def _freeze_experts(layer: MolaLinear, module: str, experts: list[Modules]) -> None:
    down, up = layer.factors("default")  # (E, r, in), (E, out, r)
    with torch.no_grad():
        down.zero_()
        up.zero_()
        for expert, modules in enumerate(experts):
            if (factors := modules.get(module)) is not None:
                down[expert, : len(factors.A)] = factors.A
                up[expert, :, : len(factors.A)] = factors.scaling * factors.B
        for parameter in layer.lamella_mola_router["default"].parameters():
            parameter.zero_()
    down.requires_grad_(False)
    up.requires_grad_(False)


@composition("arrow", loads=False)
def arrow(
    loras: Loras, target: Target, top_k: Annotated[int, Field(gt=0)] = 3, temperature: Temperature = 1.0
) -> Built:
    """PEFT's Arrow: each token goes to the LoRAs whose strongest input direction it lies along. Nothing is trained.

    Source: Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs, ICML 2024, §3.

    Raises:
        LamellaError: ranks or modules differ, or ``top_k`` is more than there are.
    """
    if top_k > len(loras):
        raise LamellaError(f"top_k={top_k} is more than the {len(loras)} LoRAs given. Lower it.")
    # PEFT knows the LoRAs of an Arrow by these names
    inside = {f"task_{index}": modules for index, modules in enumerate(loras.values())}
    ranks = {(name, len(factors.A)) for modules in inside.values() for name, factors in modules.items()}
    if any(len(ranks) != len(modules) for modules in inside.values()) or len({rank for _, rank in ranks}) > 1:
        raise LamellaError("PEFT's Arrow needs LoRAs of one rank in the same modules. Leave out those that differ.")
    model = target.with_loras(inside)
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = list(inside), []
    rank = next(rank for _, rank in ranks)
    targets = sorted(name for name, _ in ranks)
    model.add_adapter(_ARROW, LoraConfig(arrow_config=config, target_modules=targets, r=rank))
    model.set_adapter(_ARROW)
    return Built(model.requires_grad_(False))


@method("xlora")
class XLora(RebuiltMethod):
    """X-LoRA as PEFT has it: one linear layer gives every token its mixing weights, the same ones in all modules.

    A classifier on the last hidden state of a first pass gives the mixing weights of a second. It needs
    ``input_ids``, and knows no cache. PEFT's own files lack the classifier.

    Source: Buehler & Buehler, X-LoRA: Mixture of Low-Rank Adapter Experts, 2024.
    """

    layerwise: bool = Field(False, description="whether each adapted module has its own weights")
    temperature: Temperature = 1.0

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The model; its classifier alone trains.

        Raises:
            LamellaError: an embedding or convolution is adapted, or the head is a new one.
        """
        # PEFT calls the LoRAs by their positions
        loras = dict(zip(map(str, range(len(self.adapters))), self.loras(backbone, task).values(), strict=True))
        backbone.model.config.use_cache = False  # PEFT refuses it otherwise
        with TemporaryDirectory() as folder:
            places = {position: Path(folder) / position for position in loras}
            # PEFT reads tensors by names that only some families have: it gets none, and factors are filled in here
            for position, place in places.items():
                lora_config(loras[position]).save_pretrained(str(place))
                save_file({}, place / "adapter_model.safetensors")
            config = XLoraConfig(
                hidden_size=backbone.model.config.hidden_size,
                adapters={position: str(place) for position, place in places.items()},
                layerwise_scalings=self.layerwise,
                softmax_temperature=self.temperature,
                task_type=shared(backbone, task, train_head=False)["task_type"],
            )
            model = get_peft_model(backbone.model, config)
        config.adapters = {position: position for position in loras}
        for position, modules in loras.items():
            fill(backbone.model, position, modules)
        return Built(model)
