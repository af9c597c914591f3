"""`tiny-moe`: a small mixture of experts, trained from scratch, beside what it has to beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    set_seed,
)

from lamella.lab.data import Task
from lamella.statistics import paired_interval
from models.building import Clock, Made
from models.corpus import documents, prose, token_blocks, train_tokenizer
from models.fitting import Columns, Curve, fit
from models.scores import Bigrams, expert_shares, model_nll, perplexities, routers_balance, smallest
from models.settings import TinyMoeSettings

_WATCHED = 32  # blocks of each kind, of the validation rows, on which the trainings are watched


def make_tiny_moe(settings: TinyMoeSettings) -> Made:
    """Train the tokenizer, the mixture and the dense model; score them on test documents."""
    clock = Clock()
    with clock.part("tokenizer and texts"):
        tasks = {kind: prose(kind) for kind in settings.kinds}
        train = {kind: documents(task, "train", settings.characters, settings.seed) for kind, task in tasks.items()}
        tokenizer = train_tokenizer([text for texts in train.values() for text in texts], settings.vocabulary)
        blocks = {kind: token_blocks(texts, tokenizer, settings.block) for kind, texts in train.items()}
        watched, test = (_held_out(settings, tasks, split, tokenizer) for split in ("validation", "test"))
    rows = _columns(torch.cat(list(blocks.values())))
    models = {"mixture": mixture(settings, tokenizer), "dense": dense(settings, tokenizer)}
    nll, curves = _floors(rows["labels"], test, settings.vocabulary), {}
    for name, model in models.items():
        with clock.part(name):
            curves[name] = _train(model, rows, watched, settings, balanced=name == "mixture")
        model.to(torch.bfloat16).float()  # figures are those of the weights that are kept
        nll[name] = _scored(model, test)
    made, sizes = models["mixture"], {name: model.num_parameters() for name, model in models.items()}
    shares = expert_shares(made, _columns(torch.cat(list(test.values()))), settings.top_k)
    log = {
        "sources": {kind: task.source for kind, task in tasks.items()},
        "tokens": {kind: part.numel() for kind, part in blocks.items()},
        "test_tokens": {kind: part.numel() for kind, part in test.items()},
        "test_perplexity": {name: perplexities(values) for name, values in nll.items()},
        "mixture_minus_dense_nats": _difference(nll["mixture"], nll["dense"]),
        "parameters": sizes,
        "active_parameters": {"mixture": sizes["mixture"] - _idle(settings), "dense": sizes["dense"]},
        "shares": shares,
        "smallest_share": smallest(shares),
        "seconds": clock.seconds,
        "curves": curves,
    }
    return Made(made.to(torch.bfloat16), tokenizer, log, _failed(log, settings))


def _train(
    model: PreTrainedModel,
    rows: Columns,
    watched: dict[str, Tensor],
    settings: TinyMoeSettings,
    *,
    balanced: bool,
) -> Curve:
    def balance(outputs: Any, _: Columns) -> Tensor:
        return settings.router_aux_loss_coef * routers_balance(outputs.router_logits, settings.top_k)

    def watch() -> dict[str, float]:
        few = {kind: blocks[:_WATCHED] for kind, blocks in watched.items()}
        return {"validation_perplexity": perplexities(_scored(model, few))["all"]}

    return fit(
        model,
        rows,
        settings.schedule,
        seed=settings.seed,
        balance=balance if balanced else None,
        watch=watch,
    )


def mixture(settings: TinyMoeSettings, tokenizer: PreTrainedTokenizerBase) -> Qwen2MoeForCausalLM:
    """The untrained mixture; its experts run grouped, which is the fastest way on a CPU."""
    config = Qwen2MoeConfig(
        **_common(settings, tokenizer),
        intermediate_size=settings.expert_width,
        moe_intermediate_size=settings.expert_width,
        shared_expert_intermediate_size=settings.shared_width,
        num_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,  # the balance loss of each router by itself is added in training
        qkv_bias=False,
    )
    set_seed(settings.seed)
    return Qwen2MoeForCausalLM._from_config(config, experts_implementation="grouped_mm")


def dense(settings: TinyMoeSettings, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """The untrained model without experts, as wide as what the mixture computes for one token."""
    width = settings.top_k * settings.expert_width + settings.shared_width
    set_seed(settings.seed)
    model = Qwen2ForCausalLM(Qwen2Config(**_common(settings, tokenizer), intermediate_size=width))
    for layer in model.model.layers:  # biases, which a Qwen2 has and the mixture has not
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.bias = None
    return model


def _common(settings: TinyMoeSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.hidden,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "max_position_embeddings": 2 * settings.block,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _idle(settings: TinyMoeSettings) -> int:
    """Weights of the experts that a token does not visit."""
    expert = 3 * settings.hidden * settings.expert_width
    return settings.layers * (settings.experts - settings.top_k) * expert


def _held_out(
    settings: TinyMoeSettings, tasks: dict[str, Task], split: str, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    return {
        kind: token_blocks(documents(task, split, settings.held_out_characters), tokenizer, settings.block)
        for kind, task in tasks.items()
    }


def _columns(blocks: Tensor) -> Columns:
    return {"input_ids": blocks, "labels": blocks}


def _scored(model: PreTrainedModel, blocks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {kind: model_nll(model, _columns(part)) for kind, part in blocks.items()}


def _floors(train: Tensor, test: dict[str, Tensor], vocabulary: int) -> dict[str, dict[str, Tensor]]:
    counted = Bigrams.of(train, vocabulary)
    return {
        "unigram": {kind: counted.unigram_nll(part) for kind, part in test.items()},
        "bigram": {kind: counted.bigram_nll(part) for kind, part in test.items()},
    }


def _difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, float]:
    """Mean difference per token with its paired interval over blocks, which neighbouring tokens are not."""
    means = [torch.cat([part.mean(dim=1) for part in side.values()]).tolist() for side in (first, second)]
    interval = paired_interval(*means)
    return {"mean": interval.difference, "low": interval.low, "high": interval.high}


def _failed(log: dict[str, Any], settings: TinyMoeSettings) -> list[str]:
    """What the mixture should be and is not."""
    failed, overall = [], {name: values["all"] for name, values in log["test_perplexity"].items()}
    for name, what in (("bigram", "the bigram floor"), ("dense", "the dense model of equal active size")):
        if overall["mixture"] > overall[name]:
            failed.append(f"Its perplexity on test text is {overall['mixture']:.1f}; {what} has {overall[name]:.1f}.")
    if log["smallest_share"] < settings.smallest_share:
        failed.append(f"An expert gets {log['smallest_share']:.3f} of its layer's choices: it is starved.")
    return failed
