"""Mixtures of experts along the depth of pretrained transformers.

Importing lamella registers its methods with PEFT, so that ``get_peft_model``, ``PeftModel.from_pretrained`` and
transformers' ``load_adapter`` know them.
"""

from lamella.errors import CannotMergeError, LamellaError
from lamella.tuners import Collapsed, MolaConfig, allocate, collapse, export_experts

__all__ = ["CannotMergeError", "Collapsed", "LamellaError", "MolaConfig", "allocate", "collapse", "export_experts"]
