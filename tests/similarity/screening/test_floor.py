import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import similarity_screen as reference
from tests.similarity.screening.drawn import drawn_expert

from lamella.similarity.screening.measures import floor_energy, unreachable_directions


def floor(y, target):
    energy = floor_energy(y, target, unreachable_directions(target.down)).sum()
    return float(energy / (y - y.mean(0)).square().sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 14), st.booleans(), st.integers(2, 20), st.integers(0, 1000))
def test_it_is_the_distance_from_the_column_space(ff, biases, tokens, seed):
    target = drawn_expert(ff, 10, biases, seed=seed)
    y = torch.randn(tokens, 10, generator=torch.Generator().manual_seed(seed + 1))
    assert floor(y, target) == pytest.approx(reference.floor(y, target.down, target.down_bias), rel=1e-4, abs=1e-9)


def test_directions_are_orthonormal_and_orthogonal_to_every_output():
    target = drawn_expert(6, 10)
    directions = unreachable_directions(target.down)
    assert directions.shape == (10, 4)
    assert torch.allclose(directions.T @ directions, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert (target.down.double().T @ directions).abs().max() < 1e-12


@pytest.mark.parametrize(("ff", "rank"), [(6, 3), (14, 7), (6, 0), (14, 10)])
def test_dependent_columns_reach_no_more(ff, rank):
    draw = torch.Generator().manual_seed(3)
    # exact products of small integers: the dependence is exact in float32 too
    left = torch.randint(-3, 4, (10, rank), generator=draw).float()
    down = left @ torch.randint(-3, 4, (rank, ff), generator=draw).float()
    assert int(torch.linalg.matrix_rank(down)) == rank
    assert unreachable_directions(down).shape == (10, 10 - rank)


def test_a_small_direction_still_counts_as_reachable():
    # an aligner could make its hidden unit large
    down = torch.eye(10)[:, :4] * torch.tensor([1.0, 1.0, 1.0, 1e-6])
    assert unreachable_directions(down).shape == (10, 6)


def test_it_is_zero_for_as_many_hidden_units_as_outputs_and_for_the_target_itself():
    y = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    assert floor(y, drawn_expert(10, 10)) == 0
    target = drawn_expert(4, 10, biases=True)
    assert floor(target(y), target) < 1e-12


@pytest.mark.parametrize("biases", [False, True])
def test_no_input_at_all_gets_below_it(biases):
    """Gradient descent on a free input for every token: more than any aligner can do."""
    source, target = drawn_expert(3, 8, biases, seed=1), drawn_expert(3, 8, biases, seed=2)
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    y = source(x)
    free = torch.nn.Parameter(x.clone())
    optimizer = torch.optim.Adam([free], lr=0.05)
    variance, reached = (y - y.mean(0)).square().mean(), torch.inf
    for _ in range(600):
        error = (target(free) - y).square().mean() / variance
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        reached = min(reached, float(error.detach()))
    bound = floor(y, target)
    assert bound <= reached
    assert reached < 2 * bound  # and the bound says something: a free input comes near it


def test_leaving_out_the_bias_would_not_be_a_bound():
    target = drawn_expert(3, 8, biases=True)
    y = target(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))
    without = (y @ unreachable_directions(target.down).float()).square().sum()
    assert without > 1
    assert floor(y, target) < 1e-10
