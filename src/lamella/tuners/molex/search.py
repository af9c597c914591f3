"""The best single guest for a whole model: the strongest control that needs no router."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lamella.backbones import locate_stacks
from lamella.errors import LamellaError
from lamella.tuners.molex.config import MolexConfig

Batch = Mapping[str, Any]


def loss_of_model(model: nn.Module, batch: Batch) -> Tensor:
    """The loss a model returns for a batch with labels."""
    loss = model(**batch).loss
    if not isinstance(loss, Tensor):
        raise LamellaError(f"{type(model).__name__} returned no loss; put labels into the batches, or pass a loss.")
    return loss


@torch.no_grad()
def best_fixed_layer(
    model: nn.Module,
    batches: Iterable[Batch],
    config: MolexConfig | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = loss_of_model,
) -> int:
    """Finds the block of the model's own that, as every block's guest, gives the lowest mean loss on training data.

    Args:
        model: the pretrained model, before ``get_peft_model``; left as it is.
        batches: training data, as keyword arguments for the model.
        config: MoLEx's settings, of which alpha and the blocks that mix count here; the defaults when None.
        loss: what to minimise, a mean over a batch.

    Returns:
        The index of the block, for ``MolexConfig(policy="fixed", fixed_layer=...)``; the lowest where several are best.

    Raises:
        LamellaError: no batches, a model that is adapted already, or a loss that is a number for no block.
    """
    held = list(batches)
    if not held:
        raise LamellaError("best_fixed_layer needs at least one batch of training data to compare the blocks on.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise LamellaError("best_fixed_layer compares the blocks of a pretrained model: call it before get_peft_model.")
    settings = config or MolexConfig()
    bare: dict[str, Any] = {
        "policy": "fixed",
        "lora": None,
        "modules_to_save": None,
        "task_type": None,
        "candidates": "all",
        "guests_of": None,
        "guest_aligner": "linear",
        "guest_weights": "pretrained",
        "guests_sha256": None,
    }
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    losses: dict[int, float] = {}
    try:
        for layer in range(min(stack.depth for stack in locate_stacks(model))):
            mean = _mean_loss(model, replace(settings, **bare, fixed_layer=layer), held, loss)
            if math.isfinite(mean):
                losses[layer] = mean
    finally:
        for parameter, requires_grad in trains:
            parameter.requires_grad = requires_grad
        for module, training in modes:
            module.training = training
    if not losses:
        raise LamellaError("The loss is not finite with any block as guest; check the batches and the loss.")
    return min(losses, key=lambda layer: losses[layer])


def _mean_loss(
    model: nn.Module, config: MolexConfig, batches: list[Batch], loss: Callable[[nn.Module, Batch], Tensor]
) -> float:
    adapted = get_peft_model(model, config).eval()
    try:
        return sum(float(loss(adapted, batch)) for batch in batches) / len(batches)
    finally:
        adapted.unload()
