import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella.lab.runs.callbacks import routing_summary
from lamella.lab.runs.settings import RunSettings
from lamella.lab.runs.trainer import BatchOrder, total_steps


def order(lengths, batch_size, seed=0, epoch=0, sort=True):
    return list(BatchOrder([len(lengths)], batch_size, seed, lambda: epoch, lengths if sort else None))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=200), st.integers(1, 7), st.booleans())
def test_every_row_comes_once_an_epoch(lengths, batch_size, sort):
    assert sorted(order(lengths, batch_size, sort=sort)) == list(range(len(lengths)))


def test_batches_hold_rows_alike_in_length():
    lengths = [1, 9] * 40
    indices = order(lengths, 8)

    for start in range(0, 80, 8):
        assert len({lengths[index] for index in indices[start : start + 8]}) == 1


def test_the_order_of_batches_is_not_that_of_lengths():
    lengths = list(range(80))
    first_of_batch = [min(order(lengths, 8)[start : start + 8]) for start in range(0, 80, 8)]

    assert first_of_batch != sorted(first_of_batch)


def test_the_order_is_that_of_the_runs_there_are():
    """An interrupted run goes on in the order that it began with, and scores on the pages stay what they are."""
    assert order([1] * 10, 4, sort=False) == [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]
    assert order([3, 1, 2, 5, 4] * 2, 2, seed=1, epoch=2) == [1, 6, 3, 8, 9, 4, 0, 5, 2, 7]


def test_epochs_and_seeds_differ_and_repeat():
    lengths = list(range(40))

    assert order(lengths, 4) == order(lengths, 4)
    assert order(lengths, 4) != order(lengths, 4, epoch=1)
    assert order(lengths, 4) != order(lengths, 4, seed=1)


@pytest.mark.parametrize(
    ("changes", "rows", "world", "steps"),
    [
        ({"epochs": 1, "batch_size": 32}, 4181, 1, 131),
        ({"epochs": 2, "batch_size": 32, "accumulation": 2}, 4181, 1, 132),
        ({"epochs": 1, "batch_size": 32}, 4181, 2, 66),
        ({"max_steps": 7}, 4181, 1, 7),
    ],
)
def test_total_steps(changes, rows, world, steps):
    assert total_steps(RunSettings.parse(changes), rows, world) == steps


def frame(*shares):
    rows = [
        {
            "adapter": "default",
            "stack": "encoder",
            "layer": layer,
            "module": "query",
            "expert": expert,
            "num_experts": len(share),
            "share": part,
            "mean_weight": part,
            "entropy": 0.5 + layer,
        }
        for layer, share in enumerate(shares)
        for expert, part in enumerate(share)
    ]
    return pd.DataFrame(rows)


def test_even_routers_are_balanced():
    assert routing_summary(frame([0.5, 0.5], [0.25] * 4)) == {"entropy": 1.0, "balance": 1.0, "dead_experts": 0.0}


def test_a_collapsed_router_shows():
    summary = routing_summary(frame([1.0, 0.0, 0.0, 0.0]))

    assert (summary["balance"], summary["dead_experts"]) == (4.0, 3.0)
