"""The measured backbone: a BERT-shaped encoder with random weights, and its input."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

SEQUENCE = 128
VOCABULARY = 1000


@dataclass(frozen=True)
class Batch:
    """What every arm is given in every step.

    Attributes:
        input_ids: ``(batch, tokens)``.
        attention_mask: ones, as a tokenizer makes it for rows of equal length, ``(batch, tokens)``.
        target: what the output is drawn to by a mean squared error, ``(batch, tokens, hidden)``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    target: Tensor

    def to(self, device: str, dtype: torch.dtype) -> Batch:
        """The batch on a device, its target in the given precision."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.target.to(device, dtype))


def build_encoder(hidden: int, layers: int) -> BertModel:
    """A BERT encoder without pooler or dropout, frozen: feed-forward 4 x hidden, heads of 32 features."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        intermediate_size=4 * hidden, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: BertModel = BertModel(config, add_pooling_layer=False)
    model.requires_grad_(False).train()
    return model


def twin(model: BertModel) -> BertModel:
    """A copy with the same weights in the same place: where weights lie in memory alone is worth several percent."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def build_batch(tokens: int, hidden: int) -> Batch:
    """``tokens`` random tokens in rows of 128 (one shorter row where there are fewer), none of them padding."""
    shape = (max(tokens // SEQUENCE, 1), min(tokens, SEQUENCE))
    ids = torch.randint(VOCABULARY, shape)
    return Batch(ids, torch.ones_like(ids), torch.randn(*shape, hidden))


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """The last hidden state, ``(batch, tokens, hidden)``."""
    output: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return output


def loss(output: Tensor, batch: Batch) -> Tensor:
    """A scalar whose gradient reaches every feature of every token."""
    return nn.functional.mse_loss(output, batch.target)


def pass_gradients_to_embeddings(model: BertModel) -> None:
    """Makes the backward pass go through every layer although nothing in them trains."""
    model.embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
