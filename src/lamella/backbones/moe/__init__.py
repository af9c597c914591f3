"""The experts of mixture-of-experts models: one small file per family says where router and experts are."""

from lamella.backbones.moe import (  # noqa: F401  (they register their families)
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    granite,
    mixtral,
    olmoe,
    phi,
    qwen,
    switch,
)
from lamella.backbones.moe.dispatch import Dispatch, watch_dispatch
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
    "explain_unknown",
    "find_moe_layers",
    "moe_layers",
    "register",
    "watch_dispatch",
]
