"""Tiny random models with every dropout off, and tiny batches: built in memory, the same for the same seed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    CodeGenConfig,
    DistilBertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MPNetConfig,
    MPNetForSequenceClassification,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)

from lamella import MolaConfig, MolexConfig
from lamella.backbones import Place
from lamella.routing import Routing, find_tracker
from lamella.tuners.mola import MolaLinear
from lamella.tuners.molex import MolexBlock

VOCAB = 48
PAD = 0
HIDDEN = 16


def bert(layers: int = 2, labels: int = 3, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=labels,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def mpnet(layers: int = 2, labels: int = 3, seed: int = 0) -> MPNetForSequenceClassification:
    torch.manual_seed(seed)
    config = MPNetConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=labels,
    )  # fmt: skip
    return MPNetForSequenceClassification(config).eval()


def gpt2(layers: int = 2, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=HIDDEN, n_layer=layers, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=PAD,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def llama_config(layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=PAD,
    )  # fmt: skip


def llama(layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(layers)).eval()


def llama_classifier(layers: int = 2, seed: int = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    config = llama_config(layers)
    config.num_labels = 3
    return LlamaForSequenceClassification(config).eval()


def t5(layers: int = 2, seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=24, num_layers=layers, num_decoder_layers=layers, num_heads=2,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=2,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


MODELS = {"bert": bert, "mpnet": mpnet, "gpt2": gpt2, "llama": llama, "t5": t5}

_SHAPE = {"hidden_size": HIDDEN, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64}
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
_DECODER = {**_SHAPE, **_TOKENS, "num_key_value_heads": 1, "head_dim": 8}
_CONFIGS = {
    "roberta": lambda n: RobertaConfig(
        **_SHAPE, **_TOKENS, num_hidden_layers=n, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=3,
    ),
    "distilbert": lambda n: DistilBertConfig(
        dim=HIDDEN, n_heads=2, hidden_dim=24, n_layers=n, vocab_size=VOCAB, max_position_embeddings=64, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=3,
    ),
    "vit": lambda n: ViTConfig(
        hidden_size=HIDDEN, num_attention_heads=2, intermediate_size=24, num_hidden_layers=n, image_size=8,
        patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    ),
    "qwen2": lambda n: Qwen2Config(**_DECODER, num_hidden_layers=n),
    "qwen3": lambda n: Qwen3Config(**_DECODER, num_hidden_layers=n),
    "mistral": lambda n: MistralConfig(**_DECODER, num_hidden_layers=n, sliding_window=5),
    "gemma": lambda n: GemmaConfig(**_DECODER, num_hidden_layers=n),
    "gemma2": lambda n: Gemma2Config(
        **_DECODER, num_hidden_layers=n, sliding_window=5, query_pre_attn_scalar=8,
        layer_types=[("sliding_attention", "full_attention")[i % 2] for i in range(n)],
    ),
    "gemma3": lambda n: Gemma3TextConfig(
        **_DECODER, num_hidden_layers=n, sliding_window=5, query_pre_attn_scalar=8,
        layer_types=[("sliding_attention", "full_attention")[i % 2] for i in range(n)],
    ),
    "codegen": lambda n: CodeGenConfig(
        n_embd=HIDDEN, n_layer=n, n_head=4, rotary_dim=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, **_TOKENS,
    ),
    "bloom": lambda n: BloomConfig(hidden_size=HIDDEN, n_layer=n, n_head=2, **_TOKENS),
    "opt": lambda n: OPTConfig(
        hidden_size=HIDDEN, ffn_dim=24, num_attention_heads=2, word_embed_proj_dim=HIDDEN, num_hidden_layers=n,
        max_position_embeddings=64, dropout=0.0, **_TOKENS,
    ),
}  # fmt: skip


def build(name: str, layers: int = 4, seed: int = 0) -> PreTrainedModel:
    """A tiny model of any family that MoLEx knows."""
    if name in MODELS:
        return MODELS[name](layers=layers, seed=seed)
    torch.manual_seed(seed)
    classes = {"vit": AutoModelForImageClassification}
    classes |= dict.fromkeys(("roberta", "distilbert"), AutoModelForSequenceClassification)
    return classes.get(name, AutoModelForCausalLM).from_config(_CONFIGS[name](layers)).eval()


FAMILIES = (*MODELS, *_CONFIGS)
# One for each way through the code: an encoder, pixels, Conv1D and learned positions, rotary positions, layers of two
# kinds, and an encoder with a decoder.
PATHS = ("bert", "vit", "gpt2", "llama", "gemma2", "t5")


def batch(model: PreTrainedModel, rows: int = 3, tokens: int = 7, pad: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Inputs and labels that suit the model; row i > 0 is padded on the right by up to ``pad`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator), "labels": torch.arange(rows) % 3}
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, tokens - min(row, pad) :] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__.endswith("SequenceClassification"):
        return {**inputs, "labels": torch.arange(rows) % 3}
    if model.config.is_encoder_decoder:
        labels = torch.randint(3, VOCAB, (rows, tokens - 2), generator=generator)
        labels[-1, -2:] = -100
        return {**inputs, "labels": labels}
    return {**inputs, "labels": ids.masked_fill(mask == 0, -100)}


def inputs(model: PreTrainedModel, **options: Any) -> dict[str, Tensor]:
    """The same without labels; an encoder-decoder is given the decoder's ids instead."""
    given = batch(model, **options)
    labels = given.pop("labels")
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = labels.clamp_min(PAD)
    return given


def adapted(model: PreTrainedModel, **config: Any) -> PeftModel:
    """A MoLA adapter that already does something: three experts, top-2, B at random."""
    torch.manual_seed(17)
    settings = {
        "r": 2,
        "lora_alpha": 6,
        "num_experts": 3,
        "top_k": 2,
        "init_lora_weights": False,
        "router_aux_loss_coef": 0.0,
    }
    return get_peft_model(model, MolaConfig(**{**settings, **config}))


def molex(model: PreTrainedModel, sharp: bool = True, **config: Any) -> PeftModel:
    """A MoLEx adapter that already does something: guests of half the weight, a router that tells sequences apart."""
    torch.manual_seed(17)
    settings = {"alpha": 0.5, "lora": LoraConfig(r=2, target_modules="all-linear"), "init_lora_weights": False}
    adapted = get_peft_model(model, MolexConfig(**{**settings, "router_aux_loss_coef": 0.0, **config}))
    if sharp:
        sharpen(adapted)
    return adapted.eval()


def sharpen(model: nn.Module) -> None:
    """Routers that choose different blocks for different inputs."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molex_router" in name and name.endswith("weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def blocks(model: nn.Module) -> list[MolexBlock]:
    """The wrapped blocks of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MolexBlock)]


@contextmanager
def watch(model: nn.Module) -> Iterator[list[tuple[Place, Routing, Tensor | None]]]:
    """Every routing of the forwards inside, with where it was taken and the mask it was given."""
    seen: list[tuple[Place, Routing, Tensor | None]] = []

    def observe(layer: MolaLinear, adapter: str, routing: Routing, mask: Tensor | None, shape: object) -> None:
        seen.append((layer.place, routing, mask))

    tracker = find_tracker(model)
    assert tracker is not None
    with tracker.observed(observe):
        yield seen


def gradients(model: nn.Module, part: str = "") -> dict[str, Tensor]:
    """The gradients that have arrived at the trainable parameters whose name contains ``part``; then forgets them."""
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if part in name and p.grad is not None}
    model.zero_grad(set_to_none=True)
    return actual


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    # Looser than float64 allows: Llama and T5 take their norms in float32 whatever the model's precision.
    tolerance = {"rtol": 1e-5, "atol": 1e-6, **tolerance}
    assert actual.keys() == expected.keys()
    assert actual, "nothing to compare"
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
