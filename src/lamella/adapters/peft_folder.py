"""A LoRA that PEFT wrote: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key
from torch import Tensor

from lamella.adapters.locate import CONFIG, read_json
from lamella.adapters.pairs import Pairs, pair, refuse_other_methods, refuse_unknown
from lamella.adapters.source import MODEL, Parsed, Tokens
from lamella.errors import LamellaError

# What PEFT, DDP, FSDP, gradient checkpointing and torch.compile put into the names of a wrapped model's tensors.
_PREFIX = re.compile(r"(module\.)?(base_model\.model\.)+")
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
# A state dict taken from the model itself, not through PEFT, has the adapter's name in it.
_OF_ADAPTER = re.compile(
    r"(?P<before>.+\.(lora_(embedding_)?[AB]|modules_to_save|trainable_tokens_delta))\.(?P<adapter>(?!weight$|bias$)[^.]+)"
    r"(?P<after>(\..+)?)"
)
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta")
_ORIGINALS = re.compile(r".+\.(original_module\..+|trainable_tokens_original(\.[^.]+)?)")
# Initialisations that take part of the base weight into the LoRA, so that it fits no base but the one they left.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What a string or a number in place of true or false would turn on, whatever it says.
_SWITCHES = ("use_rslora", "use_dora", "lora_bias", "use_qalora")
# Fields under which a LoRA computes something else than W x + s B A x.
_VARIANTS = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
             "layer_replication")  # fmt: skip


def read_peft(folder: Path, tensors: Mapping[str, Tensor], who: str) -> Parsed:
    """Reads a PEFT folder's tensors with its config.

    Raises:
        LamellaError: it is not a plain LoRA, or its tensors do not fit its config.
    """
    config = _config(folder, who)
    refuse_other_methods(tensors, who)
    refuse_variants(config, who)
    named, scaling = plain_names(tensors, who), scaling_by(config, who)
    pairs = pair(named, scaling, who)
    _refuse_other_alphas(named, pairs, scaling, who)
    rest = pairs.rest
    skipped = [(key, "the base's own, untrained") for key in rest if _ORIGINALS.fullmatch(key)]
    tokens = {match["module"]: key for key in rest if (match := _TOKENS.fullmatch(key))}
    whole = {key: tensor for key, tensor in rest.items() if _is_whole(key, config)}
    refuse_unknown(set(rest) - set(whole) - set(tokens.values()) - {key for key, _ in skipped}, who)
    return Parsed(
        format="PEFT",
        base=config.base_model_name_or_path,
        components={MODEL: pairs.modules} if pairs.modules or whole or tokens else {},
        skipped=skipped,
        constants={MODEL: pairs.constants},
        whole={key.replace(".base_layer.", ".").replace(".modules_to_save.", "."): t for key, t in whole.items()},
        tokens={module: Tokens(_indices(module, config, who), rest[key]) for module, key in tokens.items()},
        config=config,
    )


def plain_names(tensors: Mapping[str, Tensor], who: str) -> dict[str, Tensor]:
    """PEFT's names without prefix, wrappers and the adapter's name.

    Raises:
        LamellaError: two tensors of one name, or of two adapters.
    """
    plain: dict[str, Tensor] = {}
    adapters: dict[str, None] = {}
    for key, tensor in tensors.items():
        name = _PREFIX.sub("", _WRAPPERS.sub("", key), count=1)
        if match := _OF_ADAPTER.fullmatch(name):
            adapters[match["adapter"]] = None
            name = match["before"] + match["after"]
        if len(adapters) > 1:
            raise LamellaError(
                f"{who} holds the tensors of several adapters, {' and '.join(adapters)}. Save each by itself, with "
                "save_pretrained(folder, selected_adapters=[...])."
            )
        if name in plain:
            raise LamellaError(f"{who} has {name} twice, with and without a prefix. Save it again without one.")
        plain[name] = tensor
    return plain


def scaling_by(config: LoraConfig, who: str) -> Callable[[str, int], float]:
    """The scaling that PEFT gives a module: alpha and rank by their patterns, ``alpha / r`` or ``alpha / sqrt(r)``."""

    _check_kinds(config, who)

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


def _refuse_other_alphas(
    named: Mapping[str, Tensor], pairs: Pairs, scaling: Callable[[str, int], float], who: str
) -> None:
    """Raises where an alpha beside the tensors, which PEFT does not read, is another than the config's."""
    for module, lora in pairs.modules.items():
        if f"{module}.alpha" in named and not math.isclose(lora.scaling, by_config := scaling(module, len(lora.A))):
            raise LamellaError(
                f"{who} has {module}.alpha in its file, a scaling of {lora.scaling:g}, where its config says "
                f"{by_config:g}. Remove the one that is wrong; PEFT itself reads the config."
            )


def refuse_variants(config: LoraConfig, who: str) -> None:
    """Refuses configs under which the tensors mean something else than ``W x + s B A x``.

    Raises:
        LamellaError: a DoRA, a variant of LoRA, or an initialisation that changed the base.
    """
    if config.use_dora:
        refuse_other_methods(["lora_magnitude_vector"], who)
    if config.target_parameters:
        raise LamellaError(
            f"{who} adapts parameters that are no module's weight (target_parameters: "
            f"{', '.join(sorted(config.target_parameters))}), such as the fused experts of an MoE; a composition mixes "
            "the outputs of modules, and these have none. Train a LoRA of the attention, or merge this one with PEFT."
        )
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
    method = str(read_json(folder / CONFIG).get("peft_type"))
    if method != "LORA":
        way = " Export its experts with lamella.export_experts first." if method == "LAMELLA_MOLA" else ""
        raise LamellaError(f"{who} is an adapter of the method {method}, not a LoRA. Only LoRAs can be composed.{way}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise LamellaError(f"{who} has an adapter_config.json that PEFT refuses: {error}") from error
    assert isinstance(config, LoraConfig)
    return config


def _check_kinds(config: LoraConfig, who: str) -> None:
    """Raises unless what a scaling is made of is of the right kind, at which PEFT does not look."""
    given: dict[str, object] = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    wrong = [(name, value, "an object") for name, value in given.items() if not isinstance(value, dict)]
    ranks = {"r": config.r, **_each("rank_pattern", config.rank_pattern)}
    alphas = {"lora_alpha": config.lora_alpha, **_each("alpha_pattern", config.alpha_pattern)}
    wrong += [(name, r, "a whole number") for name, r in ranks.items() if type(r) is not int]
    wrong += [(name, one, "a number") for name, one in alphas.items() if type(one) not in (int, float)]
    wrong += [(n, v, "true or false") for n in _SWITCHES if type(v := getattr(config, n, False)) is not bool]
    for name, value, kind in wrong:
        raise LamellaError(
            f"{who} has {name}={value!r} in its config, which must be {kind}. Restore the one that was saved with it."
        )


def _each(name: str, pattern: object) -> dict[str, object]:
    return {f"{name}[{key!r}]": value for key, value in pattern.items()} if isinstance(pattern, dict) else {}


def _is_whole(key: str, config: LoraConfig) -> bool:
    """Whether a tensor was trained whole, by what the config says was trained beside the factors."""
    parts = key.split(".")
    return (
        "modules_to_save" in parts
        or saved_whole(key.rpartition(".")[0], config) is not None
        or (parts[-1] == "bias" and config.bias != "none")
        or (parts[-1] == "weight" and bool(set(parts) & set(EMBEDDING_LAYER_NAMES)))
    )


def saved_whole(name: str, config: LoraConfig | None) -> str | None:
    """The module that PEFT saved whole and is this one or holds it: its name ends as the config has it; None if none.

    ``modules_to_save=["norm"]`` are ``model.norm`` and each ``input_layernorm``.
    """
    kept = tuple(() if config is None else config.modules_to_save or ())
    parts = name.split(".")
    holders = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((holder for holder in holders if holder.endswith(kept)), None)


def _indices(module: str, config: LoraConfig, who: str) -> list[int]:
    """Which tokens of an embedding were trained."""
    given = config.trainable_token_indices or []
    if isinstance(given, dict):
        given = next((of for name, of in given.items() if f".{module}".endswith(f".{name}")), [])
    if not given:
        raise LamellaError(
            f"{who} holds trained tokens of {module}, and its config does not say which (trainable_token_indices). "
            "Restore the adapter_config.json that was saved with it."
        )
    return [int(index) for index in given]
