"""The routers of a smaller model, taught by the whole one what to choose now (Router-KD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lamella.backbones.modes import evaluating
from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.progress import counted
from lamella.similarity.swapping.scores import Batch, inputs_on

RATE = 1e-3


def distil_routers(
    small: PreTrainedModel, whole: PreTrainedModel, batches: Sequence[Batch], passes: int = 1, lr: float = RATE
) -> None:
    """Trains the routers of the smaller model in place, and nothing else.

    The loss is the Kullback-Leibler divergence ``KL(p_whole || p_small)`` of what is predicted next, mean over real
    tokens. Adam, a step for each batch, the rate falling linearly to 0.

    Args:
        small: a smaller copy of ``whole``.
        whole: with all its experts.
        batches: text; no labels are needed.
        passes: over the text.
        lr: first learning rate.

    Raises:
        LamellaError: the divergence is not finite.

    Source: Hyeon and Do 2026, Is Retraining-Free Enough?, arXiv 2603.02217.
    """
    routers = [parameter for layer in moe_layers(small) for parameter in layer.router_module.parameters()]
    if not routers:  # as where a token's id is its decision
        return
    needed = {parameter: parameter.requires_grad for parameter in small.parameters()}
    for parameter in needed:
        parameter.requires_grad_(False)
    for parameter in routers:
        parameter.requires_grad_(True)
    steps = passes * len(batches)
    adam = torch.optim.Adam(routers, lr=lr)
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: max(0.0, 1 - step / steps))
    device = next(small.parameters()).device
    try:
        with evaluating(small), evaluating(whole), torch.enable_grad():
            for step in counted(range(steps), "distilling", "steps"):
                inputs = inputs_on(device, batches[step % len(batches)])
                loss = _divergence(small, whole, inputs)
                if not torch.isfinite(loss):
                    raise LamellaError(
                        f"The divergence of the smaller model at step {step} is not finite; lower the learning "
                        "rate, or load the model in float32."
                    )
                loss.backward()
                adam.step()
                falling.step()
                adam.zero_grad()
    finally:
        for parameter, before in needed.items():
            parameter.requires_grad_(before)


def _divergence(small: nn.Module, whole: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        taught = whole(**inputs).logits.float().log_softmax(-1)  # (batch, tokens, vocabulary)
    learned = small(**inputs).logits.float().log_softmax(-1)
    each = (taught.exp() * (taught - learned)).sum(-1)  # (batch, tokens)
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != each.shape:  # an encoder-decoder's logits are of the labels
        return each.mean()
    return (each * mask).sum() / mask.sum()
