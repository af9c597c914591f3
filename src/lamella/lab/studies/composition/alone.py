"""The LoRAs of a study by themselves, on one backbone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from peft import PeftModel

from lamella.lab.data import Task, load_backbone
from lamella.lab.methods.compositions import as_loras, read_loras


class LorasAlone:
    """Trained LoRAs as adapters of one model of its own, one of them active at a time.

    Args:
        model: the backbone, as a run names it.
        task: that decides the backbone's head.
        places: where each LoRA lies.
    """

    def __init__(self, model: str, task: Task, places: Mapping[str, str]) -> None:
        self._model, self._task, self._places = model, task, places
        # PEFT wants names without dots
        self._adapters = {name: f"lora{index}" for index, name in enumerate(places)}

    def of(self, name: str) -> PeftModel | None:
        """The model with that LoRA alone, until another is asked for; None where there is none of that name.

        Raises:
            LamellaError: the LoRAs cannot be read, or do not fit the backbone.
        """
        if name not in self._adapters:
            return None
        self._loaded.set_adapter(self._adapters[name])
        return self._loaded

    @cached_property
    def _loaded(self) -> PeftModel:
        backbone = load_backbone(self._model, self._task)
        loras = read_loras(backbone, self._places)
        return as_loras(backbone, self._task, {self._adapters[name]: own for name, own in loras.items()}).eval()
