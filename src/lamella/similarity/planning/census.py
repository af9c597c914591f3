"""What a plan must know of a model: its experts and their sizes, read from its structure alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from lamella.backbones.moe import MoELayer, moe_layers
from lamella.errors import LamellaError


@dataclass(frozen=True)
class LayerSize:
    """One layer's experts.

    Attributes:
        index: of its block.
        experts: E.
        top_k: experts of a token.
        inputs, outputs: features of an expert's input and output.
        hidden: units of an expert, ff.
        projections: matrices from the input to the hidden units: 2 with a gate, 1 without.
    """

    index: int
    experts: int
    top_k: int
    inputs: int
    outputs: int
    hidden: int
    projections: int

    @property
    def forward(self) -> int:
        """FLOPs of an expert for one token."""
        return 2 * self.hidden * (self.projections * self.inputs + self.outputs)


@dataclass(frozen=True)
class Census:
    """A model in numbers.

    Attributes:
        name: class, or name given.
        layers: those with experts.
        parameters: of the model.
        active: of them, those that a token is multiplied with: without embeddings that are only looked up, and of the
            experts only top-k.
    """

    name: str
    layers: tuple[LayerSize, ...]
    parameters: int
    active: int

    @property
    def experts(self) -> int:
        """Experts of all layers."""
        return sum(layer.experts for layer in self.layers)


def take_census(model: nn.Module | PretrainedConfig | str | Path) -> Census:
    """Counts a model, or what a config would build, without weights.

    Raises:
        LamellaError: there is no config under this name, or the model has no experts that lamella knows.
    """
    built = model if isinstance(model, nn.Module) else _build(model)
    layers = moe_layers(built)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    looked_up = sum(part.weight.numel() for part in built.modules() if isinstance(part, nn.Embedding))
    head = getattr(built, "get_output_embeddings", lambda: None)()
    if head is not None and any(
        part.weight is head.weight for part in built.modules() if isinstance(part, nn.Embedding)
    ):
        looked_up -= head.weight.numel()  # looked up and multiplied with
    idle = sum((layer.num_experts - layer.top_k) * layer.experts[0].parameters for layer in layers)
    return Census(
        type(built).__name__, tuple(_size(layer) for layer in layers), parameters, parameters - looked_up - idle
    )


def _size(layer: MoELayer) -> LayerSize:
    expert = layer.experts[0]
    (hidden, inputs), outputs = expert.up.shape, expert.down.shape[0]
    projections = 1 if expert.gate is None else 2
    return LayerSize(layer.index, layer.num_experts, layer.top_k, inputs, outputs, hidden, projections)


def _build(config: PretrainedConfig | str | Path) -> nn.Module:
    """The model of a config on the meta device, where tensors have shapes and no numbers."""
    if not isinstance(config, PretrainedConfig):
        try:
            config = AutoConfig.from_pretrained(config)
        except (OSError, ValueError) as error:
            raise LamellaError(
                f"No model config is found under {str(config)!r}: {error} Name a folder or file with a config.json, a "
                "hub id, or give a config."
            ) from error
    kind = next(
        (
            kind
            for kind, known in (
                (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
                (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
            )
            if type(config) in known
        ),
        AutoModel,
    )
    with torch.device("meta"):
        return kind.from_config(config)
