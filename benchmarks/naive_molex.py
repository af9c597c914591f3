"""The form that MoLEx was published in: both blocks always run, also where a block chooses itself.

Written anew as the yardstick for lamella's MoLEx: each guest that any sequence chose runs on the whole batch, and its
output is kept where it was chosen. When all sequences agree, as they must in the published code, these are two blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BertModel

from benchmarks.encoder import clone
from lamella.tuners.molex import MolexBlock


class NaiveMolexBlock(nn.Module):
    """``h' = B_t(h) + (1 - alpha) * s * (B_tau(h) - B_t(h))``, tau by the sequence's mean softmax, s = p / stopgrad(p).

    Args:
        host: the block B_t.
        blocks: all blocks of the stack.
        alpha: weight of the host's output.
    """

    def __init__(self, host: nn.Module, blocks: list[nn.Module], width: int, alpha: float) -> None:
        super().__init__()
        self.host = host
        self.blocks = blocks  # a plain list: they are registered where they are
        self.alpha = alpha
        self.router = nn.Linear(width, len(blocks))

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Maps ``h (batch, tokens, features)``; every token counts, so none may be padding."""
        y = self.host(h, *args, **kwargs)
        logits = self.router(h)  # (batch, tokens, T)
        # float32 or wider, as in lamella, so that in float64 both decide alike
        probs = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        p, tau = probs.mean(dim=1).max(dim=-1)  # (batch,), (batch,)
        guest = torch.zeros_like(y)
        for block in torch.unique(tau).tolist():
            chosen = (tau == block)[:, None, None]
            guest = torch.where(chosen, self.blocks[block](h, *args, **kwargs), guest)
        share = ((1 - self.alpha) * p / p.detach()).to(y.dtype)[:, None, None]
        mixed: Tensor = y + share * (guest - y)
        return mixed


def naive_molex_copy(base: BertModel, model: PeftModel) -> PeftModel:
    """A clone of ``base`` with naive blocks in place of the MoLEx blocks of ``model``, with the same weights.

    Args:
        base: the backbone that ``model`` was made from, without adapters.
        model: a PeftModel with a MoLEx adapter with a router in every block.
    """
    adapter = model.active_adapters[0]
    theirs = [block for block in model.modules() if isinstance(block, MolexBlock)]
    config = theirs[0].mixtures[adapter].config
    assert isinstance(config.lora, LoraConfig)
    naive = get_peft_model(clone(base), config.lora)
    copy_loras(model, naive)
    layers = naive.get_base_model().encoder.layer
    blocks = list(layers)
    for at, block in enumerate(theirs):
        layers[at] = _copy_block(block, adapter, blocks)
    return naive


@torch.no_grad()
def copy_loras(source: nn.Module, target: nn.Module) -> None:
    """Gives the LoRAs of ``target`` the weights of those of ``source``, in the order of their modules."""
    for theirs, ours in zip(loras(source), loras(target), strict=True):
        for one, other in zip(theirs, ours, strict=True):
            other.copy_(one)


def loras(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A ``(r, in)`` and B ``(out, r)`` of every LoRA of a model with one adapter, in the order of their modules."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    return [
        (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) for layer in layers for adapter in layer.lora_A
    ]


@torch.no_grad()
def _copy_block(block: MolexBlock, adapter: str, blocks: list[nn.Module]) -> NaiveMolexBlock:
    router = block.router(adapter)
    host = blocks[block.place.layer]
    naive = NaiveMolexBlock(host, blocks, router.in_features, block.mixtures[adapter].config.alpha)
    naive.to(router.weight)
    naive.router.weight.copy_(router.weight)
    assert router.bias is not None  # MoLEx's linear router has one
    naive.router.bias.copy_(router.bias)
    return naive
