"""Mixtures of experts along the depth of pretrained transformers.

Importing lamella registers its methods with PEFT, so that ``get_peft_model``, ``PeftModel.from_pretrained`` and
transformers' ``load_adapter`` know them.
"""

from lamella.errors import CannotMergeError, LamellaError
from lamella.tracing import Trace, record_routing
from lamella.training.optimization import param_groups
from lamella.tuners import Collapsed, MolaConfig, allocate, collapse, export_experts

__all__ = [
    "CannotMergeError",
    "Collapsed",
    "LamellaError",
    "MolaConfig",
    "Trace",
    "allocate",
    "collapse",
    "export_experts",
    "param_groups",
    "record_routing",
]
