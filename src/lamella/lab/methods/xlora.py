"""PEFT's X-LoRA: a classifier on the last hidden state of a first pass weighs the LoRAs in a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from unittest.mock import patch

from peft import PeftModel, XLoraConfig, get_peft_model
from peft.tuners.xlora import model as peft_xlora
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import nn

from lamella.errors import LamellaError
from lamella.lab.methods.base import Built, method, shared
from lamella.lab.methods.compositions import Composition, Modules, fill, lora_config

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("xlora")
class XLora(Composition):
    """X-LoRA as PEFT has it: one linear layer gives every token its weights of the LoRAs, the same ones in all modules.

    PEFT names the LoRAs by their position and reads them by key names that only some families have. So they are read
    here, and given to it under positions, whatever their names and files are. It needs ``input_ids``, runs each text
    twice, and knows no cache. PEFT's checkpoints lack the classifier, so that an interrupted run begins anew.

    Source: Buehler & Buehler, X-LoRA: Mixture of Low-Rank Adapter Experts, 2024.
    """

    resumes: ClassVar[bool] = False

    name: Literal["xlora"] = "xlora"
    layerwise: bool = Field(False, description="whether each adapted module has weights of its own")
    temperature: float = Field(1.0, gt=0.0)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The model; its classifier alone trains.

        Raises:
            LamellaError: an embedding or convolution is adapted, or the head is a new one.
        """
        loras = dict(zip(map(str, range(len(self.adapters))), self.loras(backbone, task).values(), strict=True))
        backbone.model.config.use_cache = False  # PEFT refuses it otherwise
        config = XLoraConfig(
            hidden_size=backbone.model.config.hidden_size,
            adapters={position: position for position in loras},
            layerwise_scalings=self.layerwise,
            softmax_temperature=self.temperature,
            task_type=shared(backbone, task, train_head=False)["task_type"],
        )
        with _reading(loras):
            model = get_peft_model(backbone.model, config)
        return Built(model)

    def save(self, model: PeftModel, folder: Path) -> None:
        """PEFT's files, and in them the classifier, which PEFT itself leaves out."""
        super().save(model, folder)
        trained = {name: own.detach().contiguous() for name, own in model.named_parameters() if own.requires_grad}
        save_file(trained, folder / "adapter_model.safetensors")

    def load(self, backbone: Backbone, task: Task, folder: Path) -> nn.Module:
        """Built anew with the saved classifier, since PEFT would read the LoRAs again in its own way."""
        model = self.build(backbone, task).model
        saved = load_file(folder / "adapter_model.safetensors")
        wanted = {name for name, own in model.named_parameters() if own.requires_grad}
        if saved.keys() != wanted:
            raise LamellaError(
                f"{folder} is no X-LoRA that lamella saved: {sorted(saved.keys() ^ wanted)[0]} is missing or unknown."
            )
        model.load_state_dict(saved, strict=False)
        return model


@contextmanager
def _reading(loras: dict[str, Modules]) -> Iterator[None]:
    def put(lora_model: Any, adapter_name: str, **_: Any) -> None:
        modules = loras[adapter_name]
        lora_model.peft_config[adapter_name] = lora_config(modules)
        lora_model.inject_adapter(lora_model.model, adapter_name)
        fill(lora_model.model, adapter_name, modules)

    with patch.object(peft_xlora, "_load_adapter_into_lora_model", put):
        yield
