"""A sequence's prediction is its own: other sequences, padding and the size of the batch change nothing."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from tests import tiny
from torch import Tensor

SETTINGS = [
    {"granularity": "sequence", "aggregate": "mean"},
    {"granularity": "sequence", "aggregate": "mode"},
    {"granularity": "sequence", "top_k": 2, "score": "sigmoid"},
    {"granularity": "token"},
    {"policy": "random"},
    {"policy": "uniform"},
]


def padded(rows: list[list[int]], width: int, side: str) -> dict[str, Tensor]:
    ids = torch.full((len(rows), width), tiny.PAD)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[at, place], mask[at, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def at_real(model: PeftModel, given: dict[str, Tensor]) -> list[Tensor]:
    """Each sequence's outputs at its real tokens, or its one answer."""
    positions = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
    extra = {"position_ids": positions} if model.config.model_type in ("gpt2", "llama") else {}
    with torch.no_grad():
        logits = model(**given, **extra).logits
    if logits.dim() == 2:
        return list(logits)
    return [row[mask.bool()] for row, mask in zip(logits, given["attention_mask"], strict=True)]


sequences = st.lists(st.lists(st.integers(3, tiny.VOCAB - 1), min_size=6, max_size=9), min_size=2, max_size=4)


@functools.cache
def mixture(name: str, setting: int) -> PeftModel:
    return tiny.molex(tiny.build(name).double(), **SETTINGS[setting]).double()


@pytest.mark.parametrize(
    ("name", "setting"),
    [("bert", 0), ("bert", 2), ("bert", 4), ("gpt2", 1), ("gpt2", 5), ("llama", 0), ("llama", 3), ("llama", 4)],
)
@settings(max_examples=5, deadline=None)
@given(rows=sequences, width=st.integers(9, 12), side=st.sampled_from(["left", "right"]))
def test_alone_or_with_others(name: str, setting: int, rows: list[list[int]], width: int, side: str) -> None:
    model = mixture(name, setting)
    sides = side if name != "bert" else "right"  # BERT counts positions from the left, padding included
    together = at_real(model, padded(rows, width, sides))
    for actual, row in zip(together, rows, strict=True):
        (alone,) = at_real(model, padded([row], len(row), "right"))
        torch.testing.assert_close(actual, alone, rtol=1e-5, atol=1e-6)


def test_a_batch_decision_does_depend_on_the_others() -> None:
    model = tiny.molex(tiny.bert(layers=4), granularity="batch")
    rows = [[5, 6, 7, 8, 9, 10], [30, 31, 32, 33, 34, 35], [40, 41, 3, 3, 4, 4]]
    together = at_real(model, padded(rows, 6, "right"))
    alone = [at_real(model, padded([row], 6, "right"))[0] for row in rows]
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(together, alone, strict=True))


def test_what_stands_in_the_padding_changes_nothing() -> None:
    model = tiny.molex(tiny.bert(layers=4))
    given = padded([[5, 6, 7, 8], [9, 10, 11]], 8, "right")
    expected = at_real(model, given)
    given["input_ids"] = torch.where(given["attention_mask"].bool(), given["input_ids"], 33)
    for actual, row in zip(at_real(model, given), expected, strict=True):
        assert torch.equal(actual, row)


def test_a_sequence_of_nothing_but_padding_is_no_nan() -> None:
    for granularity in ("sequence", "token", "batch"):
        model = tiny.molex(tiny.bert(layers=4), granularity=granularity, router_aux_loss_coef=1.0).train()
        given = padded([[5, 6, 7], []], 4, "right")
        model(**given, labels=torch.tensor([0, 1])).loss.backward()
        assert all(gradient.isfinite().all() for gradient in tiny.gradients(model, "molex_router").values())
