"""Tiny random mixture-of-experts models of every family that lamella knows, and tiny batches for them.

``FAMILIES[name](seed=0, dtype=torch.float32)`` builds one, evaluating, with its routers moved off their start at zero.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)

VOCAB = 48
PAD = 0
HIDDEN = 16
EXPERTS = 4
FF = 24  # other than HIDDEN, and a multiple of 8 as grouped GEMMs in bfloat16 want it

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts_per_tok": 2,
}  # fmt: skip
_LATENT: dict[str, Any] = {  # DeepSeek's attention, and a dense first layer
    "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 6, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "intermediate_size": 32, "moe_intermediate_size": FF, "topk_group": 2,
}  # fmt: skip


def _config(kind: type[PreTrainedConfig], **own: Any) -> PreTrainedConfig:
    return kind(**{**_COMMON, **own})


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: _config(MixtralConfig, intermediate_size=FF, num_local_experts=EXPERTS),
    "qwen2_moe": lambda: _config(
        Qwen2MoeConfig, intermediate_size=32, moe_intermediate_size=FF, shared_expert_intermediate_size=10,
        num_experts=EXPERTS, decoder_sparse_step=1,
    ),
    "qwen3_moe": lambda: _config(
        Qwen3MoeConfig, intermediate_size=32, moe_intermediate_size=FF, num_experts=EXPERTS, decoder_sparse_step=1,
        head_dim=8, norm_topk_prob=True,
    ),
    "olmoe": lambda: _config(OlmoeConfig, intermediate_size=FF, num_experts=EXPERTS),
    "deepseek_v2": lambda: _config(
        DeepseekV2Config, **_LATENT, n_group=3, topk_method="group_limited_greedy", routed_scaling_factor=1.5
    ),
    "deepseek_v3": lambda: _config(DeepseekV3Config, **_LATENT, n_group=3, num_nextn_predict_layers=0),
    "switch_transformers": lambda: SwitchTransformersConfig(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=FF, num_heads=2, num_layers=4, num_sparse_encoder_layers=2,
        num_decoder_layers=2, num_sparse_decoder_layers=1, num_experts=EXPERTS, expert_capacity=2, dropout_rate=0.0,
        pad_token_id=PAD, eos_token_id=2, decoder_start_token_id=PAD, router_jitter_noise=0.0,
    ),
    "gpt_oss": lambda: _config(
        GptOssConfig, intermediate_size=FF, num_local_experts=EXPERTS, head_dim=8, sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "granitemoe": lambda: _config(
        GraniteMoeConfig, intermediate_size=FF, num_local_experts=EXPERTS, residual_multiplier=0.5
    ),
    "phimoe": lambda: _config(
        PhimoeConfig, intermediate_size=FF, num_local_experts=EXPERTS, router_jitter_noise=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}  # fmt: skip


def build(
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    experts_implementation: str | None = None,
    **config: Any,
) -> PreTrainedModel:
    """One tiny model; ``config`` changes its config. In float64 the experts run eagerly: grouped GEMMs have none."""
    torch.manual_seed(seed)
    settings = CONFIGS[name]()
    for key, value in config.items():
        setattr(settings, key, value)
    kind = AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM
    implementation = experts_implementation or ("eager" if dtype == torch.float64 else "grouped_mm")
    model: PreTrainedModel = kind.from_config(
        settings, **({} if settings.is_encoder_decoder else {"experts_implementation": implementation})
    )
    move_off_zero(model)
    return model.to(dtype).eval()


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {name: partial(build, name) for name in CONFIGS}
# one for each way in which experts are kept and chosen: fused beside a shared expert; biases, and matrices the other
# way round; the best of groups, after a dense layer; an encoder-decoder's, with a capacity
PATHS = ("qwen2_moe", "gpt_oss", "deepseek_v3", "switch_transformers")


@torch.no_grad()
def move_off_zero(model: nn.Module) -> None:
    """Weights of order one where a fresh model has tiny ones or none, so that experts, routers and biases matter."""
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        own = name.rpartition(".")[2]
        if "norm" in name or "inv_freq" in own or not parameter.is_floating_point():
            continue
        is_bias = "bias" in own
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
        nn.init.normal_(parameter, std=0.3 if is_bias else fan_in**-0.5 if "embed" not in name else 1.0)


def inputs(
    batch: int = 3,
    tokens: int = 7,
    padding: Literal["left", "right"] | None = "left",
    seed: int = 0,
    encoder_decoder: bool = False,
) -> dict[str, Tensor]:
    """A batch; unless ``padding`` is None its rows are 0, 1, 2, ... tokens shorter than ``tokens``, at least 1 long.

    For an encoder-decoder also labels, of other lengths.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padding is not None:
        shorter = torch.arange(batch).clamp(max=tokens - 1)[:, None]
        at = torch.arange(tokens).expand(batch, -1)
        mask = (at >= shorter if padding == "left" else at < tokens - shorter).long()
    given = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
    if encoder_decoder:
        labels = torch.randint(3, VOCAB, (batch, tokens - 1), generator=generator)
        if padding is not None:
            labels[torch.arange(tokens - 1).expand(batch, -1) >= tokens - 1 - torch.arange(batch)[:, None]] = -100
        given["labels"] = labels
    return given


def inputs_for(model: PreTrainedModel, **settings: Any) -> dict[str, Tensor]:
    """``inputs`` as the model takes them."""
    return inputs(encoder_decoder=bool(model.config.is_encoder_decoder), **settings)
