import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference.similarity_compress import average_linkage

from lamella.errors import LamellaError
from lamella.similarity.compression.grouping import (
    cheaper_way,
    join_until,
    least_into_most_used,
    linkage,
    medoid,
    random_distances,
    weighted_by_usage,
    within_reach,
)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(2, 9), seed=st.integers(0, 1000), data=st.data())
def test_linkage_joins_the_closest_groups(count, seed, data):
    distances = random_distances(count, seed)
    left = data.draw(st.integers(1, count))
    groups = join_until(linkage(distances), [1] * count, 0, left)
    assert sorted(sorted(group) for group in groups) == average_linkage(distances, left)


def test_what_may_not_come_together_does_not():
    keys = [(0, 0), (0, 1), (2, 0), (5, 0)]  # layers 0 and 2 are neighbours, as are 2 and 5
    within = within_reach(random_distances(4, 0), keys, across_layers=False)
    assert list(linkage(within)) == [(0, 1)]
    across = within_reach(random_distances(4, 0), keys, across_layers=True)
    for step in range(1, len(list(linkage(across))) + 1):
        groups = join_until(list(linkage(across))[:step], [1] * 4, 0, 4 - step)
        assert all({0, 3} - set(group) and {1, 3} - set(group) for group in groups)


def test_the_better_direction_counts():
    distances = np.array([[np.inf, 1.0, np.inf], [3.0, np.inf, 5.0], [np.inf, np.inf, np.inf]])
    expected = np.array([[np.inf, 1.0, np.inf], [1.0, np.inf, 5.0], [np.inf, 5.0, np.inf]])
    assert np.array_equal(cheaper_way(distances), expected)


def test_what_is_hardly_used_is_cheap_to_replace():
    distances = np.array([[np.inf, 1.0, 2.0], [4.0, np.inf, np.inf], [3.0, 6.0, np.inf]])
    expected = np.array([[np.inf, 0.5, 1.0], [0.0, 0.0, 0.0], [1.5, 3.0, np.inf]])
    assert np.array_equal(weighted_by_usage(distances, [0.5, 0.0, 0.5]), expected)


def test_the_least_used_join_the_most_used_of_their_layer():
    shares, layers = [0.5, 0.1, 0.4, 0.2, 0.8], [0, 0, 0, 1, 1]
    assert list(least_into_most_used(shares, layers)) == [(0, 1), (4, 3), (0, 2)]


def test_the_medoid_stands_best_for_the_others():
    distances = np.array([[0, 1, 9], [5, 0, 9], [9, 2, 0]], dtype=float)  # from source to target
    assert medoid([0, 1, 2], distances) == 1


def test_what_replacements_store_counts():
    steps = [(0, 1), (0, 2), (0, 3)]
    assert len(join_until(steps, [10] * 4, 0, 25)) == 2
    assert len(join_until(steps, [10] * 4, 4, 25)) == 1
    with pytest.raises(LamellaError, match="cannot be reached"):
        join_until(steps, [10] * 4, 6, 25)
    with pytest.raises(LamellaError, match="cannot be reached"):
        join_until(steps, [10] * 4, 10, 39)
