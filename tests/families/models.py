"""Tiny random models of many families of transformers, and batches for them, made from each configuration class.

Every size that a configuration has is made small by its name; what a family needs beyond that is a *fact* of it in
``FAMILIES``. No fact says what lamella can do: that is found by running.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCAB = 64
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
FIRST_WORD = 8  # smaller ids mean something
LAYERS = 3
SIDE, PATCH = 8, 4
ANSWER = 6  # tokens that a decoder beside an encoder is given
STEP = 16  # of time: samples or frames

_SIZES: tuple[tuple[int, str], ...] = (
    (
        16,
        "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim projection_dim embedding_size emb_dim "
        "kv_lora_rank q_lora_rank classifier_proj_size decoder_hidden_size cross_attention_hidden_size lru_width "
        "hidden_size_per_layer_input attention_hidden_size output_dim text_hidden_size index_head_dim "
        "encoder_hidden_size proj_codevector_dim codevector_dim projector_hidden_size out_hidden_size "
        "max_window_layers",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers depth",
    ),
    (
        2,
        "num_attention_heads num_key_value_heads n_head n_heads num_heads encoder_attention_heads "
        "decoder_attention_heads num_experts_per_tok attention_heads decoder_num_attention_heads moe_topk moe_k "
        "num_codevector_groups "
        "index_n_heads",
    ),
    (
        1,
        "n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace "
        "decoder_sparse_step moe_num_shared_experts",
    ),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts num_conv_pos_embedding_groups index_topk"),
    (
        8,
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim d_kv d_head rotary_dim num_mel_bins sliding_window "
        "num_conv_pos_embeddings",
    ),
    (
        24,
        "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim moe_intermediate_size hidden_dim mlp_dim "
        "shared_expert_intermediate_size shared_intermediate_size ffn_hidden_size embedding_hidden_dim",
    ),
    (64, "max_position_embeddings n_positions max_target_positions n_ctx max_seq_len"),
    (
        VOCAB,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size encoder_vocab_size src_vocab_size tgt_vocab_size",
    ),
    (SIDE, "image_size"),
    (PATCH, "patch_size"),
    (PAD, "pad_token_id"),
    (BOS, "bos_token_id decoder_start_token_id"),
    (EOS, "eos_token_id"),
    (IMAGE, "image_token_id image_token_index"),
)
_SMALL: dict[str, Any] = {name: size for size, names in _SIZES for name in names.split()}
_SMALL |= {"forced_bos_token_id": None, "forced_eos_token_id": None, "apply_spec_augment": False}
_SMALL |= {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (4, 3), "feat_extract_norm": "layer"}
_SMALL |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}


@dataclass(frozen=True)
class Family:
    """A family and how a tiny model of it is made.

    Attributes:
        name: ``config.model_type``.
        head: the auto class that builds the model, without its ``AutoModel``.
        facts: settings of its configuration beyond the small sizes; of a part of it as ``part__setting``.
        main: the name of its input that is not token ids: pixels, sound, or those beside a text.
        shape: of that input for one sequence; an axis of -1 is time and can be padded.
        joined: whether that input of a batch is one list without an axis for sequences.
        images: how many tokens of a text stand for that input; None where it is given no text.
        extra: further inputs, the same for each sequence.
        gain: of its random weights; below 1 where larger ones make a chaos that multiplies rounding.
        not_lora: modules that PEFT refuses to adapt here; nothing else adapts them either.
    """

    name: str
    head: str
    facts: dict[str, Any] = field(default_factory=dict)
    main: str | None = None
    shape: tuple[int, ...] = ()
    joined: bool = False
    images: int | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    gain: float = 1.0
    not_lora: tuple[str, ...] = ()

    @property
    def reads_text(self) -> bool:
        return self.main is None or self.images is not None

    @property
    def has_own_decoder(self) -> bool:
        return "Seq2Seq" in self.head


def tiny_config(model_type: str, facts: dict[str, Any], of: type[PreTrainedConfig] | None = None) -> PreTrainedConfig:
    """The configuration of a tiny model; ``of`` is its class where the type has none of its own."""
    kind = of or CONFIG_MAPPING[model_type]
    names = {setting.name for setting in dataclasses.fields(kind)}
    settings = {name: small for name, small in _SMALL.items() if name in names and _is_like(kind, name, small)}
    settings |= {name: 0.0 for name in names if "drop" in name and type(getattr(kind, name, None)) in (float, int)}
    for part, spec in (getattr(kind, "sub_configs_defaults", None) or {}).items():
        of_part = {key.removeprefix(f"{part}__"): value for key, value in facts.items() if key.startswith(f"{part}__")}
        inner = of_part.pop("model_type", spec.model_type)
        settings[part] = tiny_config(inner, of_part, None if inner in CONFIG_MAPPING else spec.config_class)
    return kind(**settings | {key: value for key, value in facts.items() if "__" not in key})


def _is_like(kind: type[PreTrainedConfig], name: str, small: Any) -> bool:
    """Whether a setting of this name is a number here, or several, as the small one is."""
    usual = getattr(kind, name, None)
    return usual is None or small is None or isinstance(usual, list | tuple) == isinstance(small, tuple)


def tiny_model(family: Family, seed: int = 0) -> PreTrainedModel:
    """A tiny model in evaluation mode, with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    config = tiny_config(family.name, family.facts)
    model = getattr(transformers, f"AutoModel{family.head}").from_config(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding | transformers.pytorch_utils.Conv1D):
                module.weight.normal_(std=family.gain * module.weight.shape[-1] ** -0.5)
    return model


def batch(
    family: Family,
    lengths: Sequence[int] = (7, 7, 7),
    side: str = "right",
    first: int = 0,
    positions: bool = False,
) -> dict[str, Tensor]:
    """Inputs of a model, without labels; sequence number i is the same in every batch.

    Args:
        family: of the model.
        lengths: words (or steps of time) of each sequence; shorter ones are padded.
        side: where they are padded.
        first: number of the first sequence.
        positions: whether the positions are given too, as ``generate`` does.
    """
    numbers = range(first, first + len(lengths))
    inputs: dict[str, Tensor] = {}
    if family.reads_text:
        texts = [_text(number, length, family.images or 0) for number, length in zip(numbers, lengths, strict=True)]
        inputs["input_ids"] = _padded(texts, side)  # (batch, tokens)
        real = _padded([torch.ones_like(text) for text in texts], side)  # (batch, tokens)
        inputs["attention_mask"] = real
        if positions:
            inputs["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)
        if family.joined:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    if family.main is not None:
        sizes = [tuple(STEP * length if size < 0 else size for size in family.shape) for length in lengths]
        rows = [torch.randn(size, generator=_draw(number)) for number, size in zip(numbers, sizes, strict=True)]
        put_together = torch.cat if family.joined else torch.stack
        inputs[family.main] = _padded(rows, side) if -1 in family.shape else put_together(rows)
        if -1 in family.shape:
            inputs["attention_mask"] = _padded([torch.ones(len(row), dtype=torch.long) for row in rows], side)
    if family.has_own_decoder:
        inputs["decoder_input_ids"] = torch.stack([_text(100 + number, ANSWER, 0) for number in numbers])
    return inputs | {name: torch.stack([given] * len(lengths)) for name, given in family.extra.items()}


def _draw(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number + 1)


def _text(number: int, words: int, images: int) -> Tensor:
    ids = torch.randint(FIRST_WORD, VOCAB, (words,), generator=_draw(number))
    return torch.cat([torch.full((images,), IMAGE), ids])


def _padded(rows: Sequence[Tensor], side: str) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=PAD, padding_side=side)
