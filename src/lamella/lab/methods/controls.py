"""What a learned composition has to beat: random LoRAs, one new LoRA, and weights that need not sum to 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from peft import LoraConfig, get_peft_model
from pydantic import Field
from torch import Tensor

from lamella.adapters.source import random_factors
from lamella.kernels import FrozenLoras
from lamella.lab.methods.base import Built, method, shared
from lamella.lab.methods.compositions import Loras, Target, composition
from lamella.lab.methods.routed import Mole
from lamella.tuners.mole import MoleLinear

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("mole-random")
class MoleOfRandomLoras(Mole):
    """MOLE with random LoRAs in place of the given ones, of which it has the modules, the ranks and the deltas' norms.

    The factors are drawn from a normal distribution, by the run's seed, and are saved with the routers.
    """

    embed_adapters: Literal[True] = Field(True, description="random LoRAs lie nowhere else")

    @property
    def is_mixture(self) -> bool:
        return False

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The composition, its LoRAs drawn anew."""
        built = super().build(backbone, task)
        for layer in built.model.modules():
            if isinstance(layer, MoleLinear):
                factors = layer.frozen("default")
                factors.A, factors.B = random_loras(FrozenLoras(factors.A, factors.B, factors.ranks))
        return built


@method("gates")
class Gates(Mole):
    """MOLE without what ties its weights: in each matrix a gate for every LoRA, for every token, each by itself."""

    granularity: Literal["matrix"] = "matrix"
    router_input: Literal["token"] = "token"
    score: Literal["sigmoid"] = "sigmoid"
    balance: Literal["none"] = "none"
    train_head: Literal[False] = Field(False, description="the head is the backbone's")

    @property
    def is_mixture(self) -> bool:
        return False


@composition("fresh-lora", trains=True)
def fresh_lora(
    loras: Loras,
    target: Target,
    r: Annotated[int | None, Field(gt=0, description="the largest rank of the LoRAs if absent")] = None,
    lora_alpha: Annotated[float | None, Field(gt=0, description="twice the rank if absent")] = None,
) -> Built:
    """A new LoRA in the modules that the given ones adapt, trained on the rows that routers would learn from."""
    rank = r or max(len(factors.A) for modules in loras.values() for factors in modules.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if lora_alpha is None else lora_alpha,
        target_modules=list(dict.fromkeys(module for modules in loras.values() for module in modules)),
        **shared(target.backbone, target.task, train_head=False),
    )
    return Built(get_peft_model(target.backbone.model, config))


def random_loras(loras: FrozenLoras) -> tuple[Tensor, Tensor]:
    """Factors ``A (R, in)`` and ``B (out, R)`` of random LoRAs, each as long as the given one."""
    down, up = loras.A.clone(), loras.B.clone()  # (R, in), (out, R)
    first = 0
    for rank in filter(None, loras.ranks):
        own = slice(first, first + rank)
        down[own], up[:, own] = random_factors(loras.A[own], loras.B[:, own])  # (r, in), (out, r)
        first += rank
    return down, up
