"""The measured backbone: a BERT-shaped encoder with random weights, its input and its train step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from typing_extensions import Self

from benchmarks.record import BenchSettings
from lamella.errors import LamellaError
from lamella.lab.studies.measuring import kept_megabytes
from lamella.routing import find_tracker, loss_scale

Model = TypeVar("Model", bound=nn.Module)

SEQUENCE = 128
VOCABULARY = 1000


class EncoderSettings(BenchSettings):
    """Settings of the benchmarks of an encoder, with adapters of rank r."""

    hidden: int = Field(384, ge=32)
    layers: int = Field(12, ge=4)
    r: Literal[8] = 8
    dropout: Literal[0] = 0

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        if self.hidden % 32:
            raise LamellaError(f"hidden={self.hidden} does not divide into heads of 32 features; use a multiple of 32.")
        if self.tokens > SEQUENCE and self.tokens % SEQUENCE:
            raise LamellaError(f"tokens={self.tokens} do not fill rows of {SEQUENCE}; use a multiple.")
        return self


@dataclass(frozen=True)
class Batch:
    """What every method is given in every step.

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

    def corner(self, rows: int, tokens: int) -> Batch:
        """The first tokens of the first rows."""
        return Batch(self.input_ids[:rows, :tokens], self.attention_mask[:rows, :tokens], self.target[:rows, :tokens])


def build_encoder(hidden: int, layers: int) -> BertModel:
    """A BERT encoder without pooler or dropout, frozen: feed-forward 4 x hidden, heads of 32 features."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        intermediate_size=4 * hidden, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: BertModel = BertModel(config, add_pooling_layer=False)
    model.requires_grad_(False).train()
    return model


def clone(model: Model) -> Model:
    """A copy with the same weights in the same place: where weights lie in memory alone makes several percent."""
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


def train_step(model: nn.Module, batch: Batch, learning_rate: float = 1e-4) -> Callable[[], None]:
    """Forward, backward, AdamW (fused, the Trainer's default) and zero_grad(set_to_none)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, fused=True) if trained else None

    def step() -> None:
        output = forward(model, batch)
        with _unscaled(model):
            loss(output, batch).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def _unscaled(model: nn.Module) -> AbstractContextManager[None]:
    """Says to routers that the loss, which is built outside the model, goes into the backward pass as it is."""
    return nullcontext() if find_tracker(model) is None else loss_scale(model, 1.0)


def kept_by_step(model: nn.Module, batch: Batch) -> float:
    """Megabytes of activations that a train step keeps for its backward pass."""
    given = [*model.parameters(), *model.buffers(), batch.input_ids, batch.attention_mask, batch.target]
    return kept_megabytes(lambda: loss(forward(model, batch), batch), given)
