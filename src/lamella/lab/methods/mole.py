"""MOLE as a method of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lamella.lab.methods.base import Built, method, require_own_head, shared
from lamella.lab.methods.compositions import Composition, lora_folder
from lamella.tuners.mole import MoleConfig, compose

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("mole")
class Mole(Composition):
    """Trained LoRAs weighed by routers that read their outputs; the keys are those of `lamella.MoleConfig`."""

    masked_by: ClassVar[Literal["routers"]] = "routers"

    name: Literal["mole"] = "mole"
    granularity: Literal["matrix", "sublayer", "block", "network"] = "block"
    router_input: Literal["mean", "token", "flatten"] = "mean"
    flatten_length: int | None = None
    form: Literal["delta", "block-delta", "published"] = "delta"
    temperature: float = 1.0
    learn_temperature: bool = True
    top_k: int | None = None
    balance: Literal["log", "entropy", "switch", "none"] = "log"
    router_aux_loss_coef: float = Field(0.5, ge=0.0)
    prompt_tokens: int = Field(4, gt=0)
    embed_adapters: bool = False
    train_head: bool = Field(True, description="whether the task head learns too; else it is the backbone's own")

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The composition; what was read, mapped and skipped is in the model's own summary.

        Raises:
            LamellaError: LoRAs that cannot be composed here, or a head that is neither trained nor the backbone's own.
        """
        if not self.train_head:
            require_own_head(backbone, task, self.name)
        own: dict[str, Any] = self.model_dump(exclude={"name", "adapters", "train_head"})
        config = MoleConfig(**own, **shared(backbone, task, train_head=self.train_head))
        places = {name: lora_folder(place) for name, place in self.adapters.items()}
        return Built(compose(backbone.model, places, config))
