from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import similarity_screen as reference
from tests.similarity.screening.drawn import drawn_expert

from lamella.similarity.matching import weight_distance


def reordered(expert, seed=0):
    order = torch.randperm(len(expert.up), generator=torch.Generator().manual_seed(seed))
    moved = {name: m[order] for name, m in expert.matrices.items() if name not in ("down", "down_bias")}
    return replace(expert, down=expert.down[:, order], **moved)


@settings(max_examples=20, deadline=None)
@given(st.booleans(), st.booleans(), st.integers(0, 1000))
def test_it_is_the_smallest_distance_over_every_order(biases, gate, seed):
    first, second = (drawn_expert(5, 7, biases, gate, seed=seed + one) for one in (0, 1))
    assert weight_distance(first, second) == pytest.approx(reference.weight_distance(first, second), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_a_copy_in_another_order_is_at_zero_exactly(ff, biases, gate, seed):
    expert = drawn_expert(ff, 9, biases, gate, seed)
    assert weight_distance(expert, reordered(expert, seed)) == 0


def test_units_move_as_a_whole():
    expert = drawn_expert(6, 9)
    half_moved = replace(expert, up=reordered(expert).up)  # another function than the expert's
    assert weight_distance(expert, half_moved) > 0.1


def test_it_is_symmetric_and_relative():
    first, second = drawn_expert(6, 9, biases=True), drawn_expert(6, 9, biases=True, seed=1)
    assert weight_distance(first, second) == pytest.approx(weight_distance(second, first))
    larger = [replace(e, **{name: 7 * m for name, m in e.matrices.items()}) for e in (first, second)]
    assert weight_distance(*larger) == pytest.approx(weight_distance(first, second))
    assert 0.5 < weight_distance(first, second) < 1.1
    nothing = replace(first, **{name: torch.zeros_like(m) for name, m in first.matrices.items()})
    assert weight_distance(first, nothing) == pytest.approx(1)
    assert weight_distance(nothing, nothing) == 0


def test_a_change_of_the_bias_is_seen():
    expert = drawn_expert(6, 9, biases=True)
    for name in ("up_bias", "gate_bias", "down_bias"):
        assert weight_distance(expert, replace(expert, **{name: getattr(expert, name) + 1})) > 0


@pytest.mark.parametrize("swapped", [False, True])
def test_hidden_units_without_a_partner_count_in_full(swapped):
    few = drawn_expert(4, 9)
    more = replace(
        few, up=torch.cat([few.up, torch.ones(2, 9)]), gate=torch.cat([few.gate, torch.zeros(2, 9)]),
        down=torch.cat([few.down, torch.zeros(9, 2)], dim=1),
    )  # fmt: skip
    total = 2 * sum(m.square().sum() for m in few.matrices.values()) + 18
    pair = (more, few) if swapped else (few, more)
    assert weight_distance(*pair) == pytest.approx(float((18 / total) ** 0.5))
