"""Mixtures of experts along the depth of pretrained transformers.

Importing lamella registers its methods with PEFT, so that ``get_peft_model``, ``PeftModel.from_pretrained`` and
transformers' ``load_adapter`` know them.
"""

from lamella.backbones.moe import MoELayer, moe_layers
from lamella.convert import Collapsed, collapse, export_experts
from lamella.diagnostics.doctor import Diagnosis, Finding, doctor
from lamella.diagnostics.preflight import preflight
from lamella.diffusion import compose_pipeline, load_pipeline
from lamella.errors import CannotMergeError, LamellaError
from lamella.routing import prompt
from lamella.tracing import Trace, record_routing
from lamella.tuners import (
    MolaConfig,
    MoleConfig,
    MolexConfig,
    allocate,
    compose,
    fixed_weights,
    masked_experts,
    redundancy,
)
from lamella.tuners.optimization import param_groups

__all__ = [
    "CannotMergeError",
    "Collapsed",
    "Diagnosis",
    "Finding",
    "LamellaError",
    "MoELayer",
    "MolaConfig",
    "MoleConfig",
    "MolexConfig",
    "Trace",
    "allocate",
    "collapse",
    "compose",
    "compose_pipeline",
    "doctor",
    "export_experts",
    "fixed_weights",
    "load_pipeline",
    "masked_experts",
    "moe_layers",
    "param_groups",
    "preflight",
    "prompt",
    "record_routing",
    "redundancy",
]
