"""Mixtures of experts along the depth of pretrained transformers.

Importing lamella registers its methods with PEFT, so that ``get_peft_model``, ``PeftModel.from_pretrained`` and
transformers' ``load_adapter`` know them. The rooms `lamella.similarity` and `lamella.lab` are loaded when they are
first used.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from lamella.version import __version__, warn_of_untested

warn_of_untested()  # before a version that is too old fails at an import below

# ruff: noqa: E402
from lamella.adapters import AdapterLibrary
from lamella.backbones.moe import moe_layers
from lamella.convert import collapse, export_experts
from lamella.diagnostics.doctor import doctor
from lamella.diagnostics.preflight import preflight
from lamella.diffusion import compose_pipeline, load_pipeline
from lamella.errors import CannotMergeError, LamellaError
from lamella.retrieval import shortlist
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

if TYPE_CHECKING:
    from lamella import lab, similarity

__all__ = [
    "AdapterLibrary",
    "CannotMergeError",
    "LamellaError",
    "MolaConfig",
    "MoleConfig",
    "MolexConfig",
    "Trace",
    "__version__",
    "allocate",
    "collapse",
    "compose",
    "compose_pipeline",
    "doctor",
    "export_experts",
    "fixed_weights",
    "lab",
    "load_pipeline",
    "masked_experts",
    "moe_layers",
    "param_groups",
    "preflight",
    "prompt",
    "record_routing",
    "redundancy",
    "shortlist",
    "similarity",
]


def __getattr__(name: str) -> ModuleType:
    if name in ("lab", "similarity"):
        return import_module(f"lamella.{name}")
    raise AttributeError(f"module 'lamella' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
