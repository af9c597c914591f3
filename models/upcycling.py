"""A dense model turned into a mixture of experts that computes the same, until its experts are trained separately."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from lamella.errors import LamellaError

# Llama's settings that mean the same in a Qwen2-MoE, whose attention has no biases where `qkv_bias` is off
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def upcycled(model: PreTrainedModel, layers: int, experts: int, top_k: int, seed: int = 0) -> Qwen2MoeForCausalLM:
    """A new model with the MLPs of the last ``layers`` layers as mixtures, every expert a copy of the dense MLP.

    It is a Qwen2-MoE, which may begin with dense layers; its shared expert has width 0. As the weights of the chosen
    experts sum to 1, its logits are the dense model's, whatever its new routers choose.

    Args:
        model: a Llama, such as SmolLM2; not changed.
        layers: how many become mixtures.
        experts: of each mixture.
        top_k: experts chosen for a token.
        seed: of the routers.

    Raises:
        LamellaError: no Llama, biases where a Qwen2-MoE has none, or too few layers.

    Source: sparse upcycling, arXiv 2212.05055.
    """
    config: Any = model.config
    _refuse(config, layers)
    first = config.num_hidden_layers - layers
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        mixture = Qwen2MoeForCausalLM._from_config(
            Qwen2MoeConfig(
                **{name: getattr(config, name) for name in _SHARED},
                qkv_bias=False,
                mlp_only_layers=list(range(first)),
                moe_intermediate_size=config.intermediate_size,
                shared_expert_intermediate_size=0,
                num_experts=experts,
                num_experts_per_tok=top_k,
                norm_topk_prob=True,
                router_aux_loss_coef=0.0,  # the balance loss of each router by itself is added in training
            ),
            experts_implementation="eager",  # experts as wide as these run fastest one after the other
        )
    mlps = {f"model.layers.{layer}.mlp." for layer in range(first, config.num_hidden_layers)}
    dense = {name: value for name, value in model.state_dict().items() if not name.startswith(tuple(mlps))}
    mixture.load_state_dict(dense, strict=False)
    for layer in range(first, config.num_hidden_layers):
        mlp = model.model.layers[layer].mlp
        put_experts(mixture.model.layers[layer].mlp.experts, [mlp.state_dict()] * experts)
    return mixture.eval()


def put_experts(fused: nn.Module, mlps: Sequence[dict[str, Tensor]]) -> None:
    """Write gated MLPs, given by their state dicts, into a fused module's parameters: expert e from ``mlps[e]``."""
    weights: Any = fused
    with torch.no_grad():
        for expert, mlp in enumerate(mlps):
            weights.gate_up_proj[expert] = torch.cat([mlp["gate_proj.weight"], mlp["up_proj.weight"]])  # (2F, h)
            weights.down_proj[expert] = mlp["down_proj.weight"]  # (h, F)


def last_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The model's last layers, norm and head as a model of its class that takes hidden states as ``inputs_embeds``.

    It shares its modules with the model: training the one trains the other. It keeps no cache.
    Ask only one such model for router logits: transformers records a shared router once for each model that asked.
    """
    config: Any = copy.deepcopy(model.config)
    config.num_hidden_layers, config.use_cache = layers, False
    if hasattr(config, "mlp_only_layers"):
        before = model.config.num_hidden_layers - layers
        config.mlp_only_layers = [layer - before for layer in config.mlp_only_layers if layer >= before]
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-layers:]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        last: Any = type(model)(config)
    last.model.layers = nn.ModuleList(list(model.model.layers)[-layers:])
    last.model.norm, last.model.rotary_emb = model.model.norm, model.model.rotary_emb
    last.model.embed_tokens, last.lm_head = model.model.embed_tokens, model.lm_head
    return last


@torch.no_grad()
def states_before(model: PreTrainedModel, layers: int, blocks: Tensor, batch_size: int = 8) -> Tensor:
    """The hidden states ``(B, T, h)`` that enter the last ``layers`` layers for ``blocks`` ``(B, T)``."""
    first = copy.copy(model.model)  # a second view of the same modules, without those that are not needed
    first._modules = dict(model.model._modules)
    first.layers, first.norm = nn.ModuleList(list(model.model.layers)[:-layers]), nn.Identity()
    first.config = copy.deepcopy(model.config)
    first.config.num_hidden_layers -= layers
    parts = [first(input_ids=batch, use_cache=False).last_hidden_state for batch in blocks.split(batch_size)]
    return torch.cat(parts)


def _refuse(config: Any, layers: int) -> None:
    if config.model_type != "llama":
        raise LamellaError(
            f"A {config.model_type} cannot be made a mixture here: its layers are not those of a Qwen2-MoE. Give a "
            "Llama, for instance smollm2."
        )
    if config.attention_bias or config.mlp_bias:
        raise LamellaError("A Llama with biases cannot be made a Qwen2-MoE without changing what it computes.")
    if not 0 < layers < config.num_hidden_layers:
        raise LamellaError(
            f"layers={layers} of {config.num_hidden_layers} cannot become mixtures: at least one does, and the first "
            "layer stays dense."
        )
