"""`switch-trec`: a Switch Transformer, trained from scratch to classify texts.

transformers has no Switch with a classification head. So a label is one token, which the decoder writes first, and the
answer is the label whose token has the largest logit there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    set_seed,
)

from lamella.errors import LamellaError
from lamella.lab.data import Task, load_task
from lamella.lab.runs.floors import MAJORITY, floor_predictions
from lamella.routing import balance_loss
from models.building import Clock, Made
from models.corpus import train_tokenizer
from models.fitting import Columns, fit
from models.scores import smallest
from models.settings import SwitchSettings


def make_switch(settings: SwitchSettings) -> Made:
    """Train the tokenizer and the classifier; score it beside the linear floor and the commonest label."""
    task, clock = load_task(settings.task, seed=settings.seed), Clock()
    if task.kind != "classification":
        raise LamellaError(f"{task.name} is a {task.kind} task, and a Switch is trained here to classify single texts.")
    tokenizer = train_tokenizer(task.splits["train"]["text"], settings.vocabulary)
    labels = label_tokens(task, tokenizer)
    rows = {split: _columns(task, split, tokenizer, labels, settings.max_length) for split in task.splits}
    model = switch(settings, tokenizer)

    def balance(outputs: Any, inputs: Columns) -> Tensor:
        losses = [balance_loss(*router) for router in _routers(outputs, inputs)]
        return settings.router_aux_loss_coef * torch.stack(losses).sum()

    with clock.part("training"):
        curve = fit(
            model,
            rows["train"],
            settings.schedule,
            seed=settings.seed,
            balance=balance,
            watch=lambda: {"validation_accuracy": _accuracy(model, rows["validation"], labels)},
        )
    accuracy = {"model": _accuracy(model, rows["test"], labels)}
    for floor, predictions in floor_predictions(task).items():
        accuracy[floor] = float(np.mean(predictions["test"] == np.asarray(task.splits["test"]["label"])))
    shares = _shares(model, rows["test"])
    log = {
        "source": task.source,
        "test_accuracy": accuracy,
        "label_tokens": dict(zip(task.label_names, labels.tolist(), strict=True)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "shares": shares,
        "smallest_share": smallest(shares[: settings.sparse_layers]),  # the decoder decides once for each text
        "seconds": clock.seconds,
        "curves": {"model": curve},
    }
    return Made(model, tokenizer, log, _failed(accuracy))


def switch(settings: SwitchSettings, tokenizer: PreTrainedTokenizerBase) -> SwitchTransformersForConditionalGeneration:
    """The untrained model: each ``layers / sparse_layers``-th encoder block is sparse, and so is the one decoder block.

    An expert takes all tokens of a text that choose it: nothing is dropped.
    """
    set_seed(settings.seed)
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=len(tokenizer),
            d_model=settings.hidden,
            d_kv=settings.hidden // settings.heads,
            num_heads=settings.heads,
            d_ff=settings.expert_width,
            num_layers=settings.layers,
            num_sparse_encoder_layers=settings.sparse_layers,
            num_decoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=settings.experts,
            expert_capacity=settings.max_length,
            dropout_rate=settings.dropout,
            router_jitter_noise=0.0,
            router_z_loss_coef=0.0,
            router_aux_loss_coef=0.0,  # the balance loss of each router by itself is added in training
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def label_tokens(task: Task, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Add a token for each label, such as ``<|DESC|>``; their ids ``(C,)`` in the order of the labels."""
    names = [f"<|{name}|>" for name in task.label_names]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    return torch.tensor(tokenizer.convert_tokens_to_ids(names))


def _columns(task: Task, split: str, tokenizer: PreTrainedTokenizerBase, labels: Tensor, max_length: int) -> Columns:
    """Padded texts and the one token that is to be said of each, ``(rows, 1)``."""
    rows = task.splits[split]
    texts = tokenizer(list(rows["text"]), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    said = labels[torch.tensor(rows["label"])][:, None]
    return {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"], "labels": said}


def _routers(outputs: Any, inputs: Columns) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each router's logits ``(N, E)``, its choices ``(N, 1)`` and which of the N tokens are real."""
    said = torch.ones_like(inputs["labels"])
    for layers, mask in (
        (outputs.encoder_router_logits, inputs["attention_mask"]),
        (outputs.decoder_router_logits, said),
    ):
        for logits in layers:
            flat = logits.flatten(0, 1)
            yield flat, flat.argmax(dim=-1, keepdim=True), mask.flatten().bool()


@torch.no_grad()
def _accuracy(model: PreTrainedModel, rows: Columns, labels: Tensor) -> float:
    model.eval()
    logits = model(**rows).logits[:, 0, labels]  # (rows, C)
    model.train()
    return (labels[logits.argmax(dim=-1)] == rows["labels"][:, 0]).double().mean().item()


@torch.no_grad()
def _shares(model: PreTrainedModel, rows: Columns) -> list[list[float]]:
    """Of each sparse block, the encoder's first, the share of real tokens that chose each expert."""
    model.eval()
    outputs = model(**rows, output_router_logits=True)
    return [
        (torch.bincount(chosen[real].flatten(), minlength=logits.shape[-1]).double() / real.sum()).tolist()
        for logits, chosen, real in _routers(outputs, rows)
    ]


def _failed(accuracy: dict[str, float]) -> list[str]:
    """What the classifier should be and is not."""
    majority = accuracy[MAJORITY]
    if accuracy["model"] > majority:
        return []
    return [f"Its accuracy on test texts is {accuracy['model']:.3f}; the commonest label has {majority:.3f}."]
