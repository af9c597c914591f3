"""What a language model makes of texts: how well it predicts them, and how far it is from another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lamella.lab.data import Encoded
from lamella.lab.runs.scoring import length_batches


def text_answers(model: nn.Module, encoded: Encoded, batch_size: int, other: nn.Module | None) -> pd.DataFrame:
    """A row per test text, in order: its mean loss and, where there is another model, its mean divergence from that.

    ``loss`` is the mean of -log p over the tokens that carry loss, ``kl`` that of KL(other || model) over the whole
    vocabulary at each of them; both in nats. Only one batch's logits of both models are held at a time.

    Args:
        model: a decoder in evaluation mode.
        encoded: with test rows.
        batch_size: texts per forward.
        other: a decoder with the same vocabulary.
    """
    rows: Any = encoded.test
    found: dict[str, Any] = {"loss": np.empty(len(rows)), "kl": np.full(len(rows), np.nan)}
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in length_batches(rows["length"], batch_size):
            inputs = {name: value.to(device) for name, value in encoded.collator([rows[i] for i in batch]).items()}
            labels = inputs["labels"][:, 1:]  # position t predicts the token at t + 1
            logits = _logits(model, inputs)
            others = None if other is None else _logits(other, inputs)
            for at, index in enumerate(batch):
                read = labels[at] != -100
                log_probs = logits[at][read].float().log_softmax(-1)  # (tokens, vocabulary)
                found["loss"][index] = nn.functional.nll_loss(log_probs, labels[at][read]).item()
                if others is not None:
                    found["kl"][index] = _divergence(others[at][read].float().log_softmax(-1), log_probs)
    return pd.DataFrame(found)


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    # with labels, since they tell routers where the prompt ends
    logits: Tensor = model(**inputs).logits[:, :-1]
    return logits


def _divergence(from_log: Tensor, to_log: Tensor) -> float:
    return nn.functional.kl_div(to_log, from_log, reduction="batchmean", log_target=True).item()
