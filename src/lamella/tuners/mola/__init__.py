"""MoLA: a different number of LoRA experts in each layer, top-k routed per token (arXiv 2402.08562)."""

from lamella.tuners.mola.allocation import allocate
from lamella.tuners.mola.config import MolaConfig
from lamella.tuners.mola.experts import MolaExperts
from lamella.tuners.mola.layer import MolaLinear
from lamella.tuners.mola.model import MolaModel

__all__ = ["MolaConfig", "MolaExperts", "MolaLinear", "MolaModel", "allocate"]
