"""The experts of mixture-of-experts models: one reader of transformers' contract, one small file per exception."""

from lamella.backbones.moe import (  # noqa: F401  (they register: exceptions after the rule)
    contract,
    dbrx,
    deepseek_v4,
    gemma4,
    llama4,
    longcat,
    switch,
    zaya,
)
from lamella.backbones.moe.dispatch import Dispatch, SequencesApart, real_tokens, tracked, watch_dispatch
from lamella.backbones.moe.expert import Expert
from lamella.backbones.moe.family import FAMILIES, MoEFamily, NativeRouting, register
from lamella.backbones.moe.finding import find_moe_layers, moe_layers
from lamella.backbones.moe.layer import MoELayer
from lamella.backbones.moe.unknown import explain_unknown

__all__ = [
    "FAMILIES",
    "Dispatch",
    "Expert",
    "MoEFamily",
    "MoELayer",
    "NativeRouting",
    "SequencesApart",
    "explain_unknown",
    "find_moe_layers",
    "moe_layers",
    "real_tokens",
    "register",
    "tracked",
    "watch_dispatch",
]
