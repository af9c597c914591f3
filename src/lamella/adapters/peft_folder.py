"""A LoRA that PEFT wrote: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key
from torch import Tensor

from lamella.adapters.pairs import pair, refuse_other_methods
from lamella.adapters.source import MODEL, Parsed
from lamella.errors import LamellaError

_PREFIX = "base_model.model."
_TRAINED_TOKENS = "token_adapter."
# Initialisations that take part of the base weight into the LoRA, so that it fits no base but the one they left.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields under which a LoRA computes something else than W x + s B A x.
_VARIANTS = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
             "layer_replication", "target_parameters")  # fmt: skip


def read_peft(folder: Path, tensors: Mapping[str, Tensor], who: str) -> Parsed:
    """Reads a PEFT folder's tensors with its config.

    Raises:
        LamellaError: it is not a plain LoRA, or its tensors do not fit its config.
    """
    config = _config(folder, who)
    refuse_other_methods(tensors, who)
    refuse_variants(config, who)
    unprefixed = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    if len(unprefixed) < len(tensors):
        raise LamellaError(f"{who} has tensors twice, with and without the prefix {_PREFIX}. Save it again.")
    modules, skipped = pair(unprefixed, scaling_by(config, who), _reasons(config), who)
    return Parsed("PEFT", config.base_model_name_or_path, {MODEL: modules} if modules else {}, skipped)


def scaling_by(config: LoraConfig, who: str) -> Callable[[str, int], float]:
    """The scaling that PEFT gives a module: alpha and rank by their patterns, ``alpha / r`` or ``alpha / sqrt(r)``."""

    def scaling(module: str, r: int) -> float:
        expected = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)
        if expected != r:
            raise LamellaError(
                f"{who} has rank {r} in {module}, where its config says {expected}. Config and tensors are of two "
                "LoRAs; restore the one that is wrong."
            )
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
        return float(alpha / (math.sqrt(r) if config.use_rslora else r))

    return scaling


def refuse_variants(config: LoraConfig, who: str) -> None:
    """Refuses configs under which the tensors mean something else than ``W x + s B A x``.

    Raises:
        LamellaError: a DoRA, a variant of LoRA, or an initialisation that changed the base.
    """
    if config.use_dora:
        refuse_other_methods(["lora_magnitude_vector"], who)
    for field in _VARIANTS:
        if getattr(config, field, None):
            raise LamellaError(f"{who} was trained with {field}, which is more than W x + s B A x. Train a plain LoRA.")
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise LamellaError(
            f"{who} was started with init_lora_weights={start!r}, which changes the base weights, so its tensors are "
            "for a base that nobody else has. Save it as a plain LoRA, with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )


def _config(folder: Path, who: str) -> LoraConfig:
    try:
        saved: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        method = str(saved.get("peft_type"))
    except (ValueError, AttributeError) as error:
        raise LamellaError(
            f"{who} has an adapter_config.json that is not a JSON object: {error}. Restore it."
        ) from error
    if method != "LORA":
        way = " Export its experts with lamella.export_experts first." if method == "LAMELLA_MOLA" else ""
        raise LamellaError(f"{who} is an adapter of the method {method}, not a LoRA. Only LoRAs can be composed.{way}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise LamellaError(f"{who} has an adapter_config.json that PEFT refuses: {error}") from error
    assert isinstance(config, LoraConfig)
    return config


def _reasons(config: LoraConfig) -> Callable[[str], str | None]:
    """Why a tensor of a PEFT file that is not a factor of a linear layer is left out."""
    saved = set(config.modules_to_save or ())

    def reason(key: str) -> str | None:
        parts = key.split(".")
        if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
            return "the LoRA of an embedding; only linear layers are composed"
        if "lora_B" in parts and parts[-1] == "bias":
            return "a bias of B (lora_bias=True); only the weights are composed"
        if saved & set(parts):
            return "a whole module (modules_to_save); the composition uses the model's own"
        if _TRAINED_TOKENS in key:
            return "trained tokens (trainable_token_indices); the composition uses the model's own"
        if parts[-1] == "bias" and config.bias != "none":
            return f"a bias of the base (bias={config.bias!r}); the composition uses the model's own"
        if parts[-1] == "weight" and set(parts) & set(EMBEDDING_LAYER_NAMES):
            return "an embedding layer saved whole; the composition uses the model's own"
        return None

    return reason
