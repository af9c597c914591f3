import numpy as np
import pandas as pd
import pytest
from tests.lab.studies.test_complexity import decisions

from lamella.errors import LamellaError
from lamella.lab.studies.layer_maps import layer_map, map_differences, thirds


def test_a_map_counts_the_choices_of_each_layer():
    found = layer_map(decisions([[0, 1], [0, 0], [1, 0], [0, 0]])).set_index(["group", "layer", "chosen"])["share"]

    assert found.to_dict() == {("all", 0, 0): 0.75, ("all", 0, 1): 0.25, ("all", 1, 0): 0.75, ("all", 1, 1): 0.25}


def test_a_map_per_class():
    groups = pd.Series(["HUM", "NUM", "NUM"])
    found = layer_map(decisions([[0], [1], [2]]), groups).set_index(["group", "chosen"])["share"]

    assert found["HUM"].to_dict() == {0: 1.0, 1: 0.0, 2: 0.0}
    assert found["NUM"].to_dict() == {0: 0.0, 1: 0.5, 2: 0.5}
    with pytest.raises(LamellaError, match="text 2, which belongs to no group"):
        layer_map(decisions([[0], [1], [2]]), groups.iloc[:2])


def test_thirds_split_by_length():
    lengths = pd.Series([9, 1, 2, 8, 5, 4], index=list("abcdef"))

    assert thirds(lengths).to_dict() == {
        "a": "long",
        "b": "short",
        "c": "short",
        "d": "long",
        "e": "middle",
        "f": "middle",
    }
    assert set(thirds(pd.Series([3, 3, 3, 3]))) == {"short"}


def test_the_distance_is_total_variation():
    policy, control = decisions([[0, 0], [0, 1], [0, 1], [1, 1]]), decisions([[0, 0], [1, 1], [2, 1], [2, 1]])
    found = map_differences(policy, control).iloc[0]

    # layer 0: (.75, .25, 0) against (.25, .25, .5): .5; layer 1: equal
    assert found["distance"] == pytest.approx(0.25)
    assert (found["group"], found["texts"]) == ("all", 4)


def test_p_tells_another_policy_from_the_same_one():
    generator = np.random.default_rng(0)
    first, second = (decisions(generator.integers(4, size=(100, 3))) for _ in range(2))
    same = map_differences(first, second).iloc[0]
    other = map_differences(decisions(np.full((100, 3), 2)), second).iloc[0]

    assert same["p"] > 0.05
    assert same["distance"] == pytest.approx(same["expected"], abs=0.05)
    assert other["p"] == pytest.approx(1 / 2001)
    assert other["distance"] > 0.6
    assert map_differences(first, first).iloc[0]["p"] == 1.0


def test_p_is_even_where_the_policies_are_alike():
    generator = np.random.default_rng(2)
    p_values = [
        map_differences(*(decisions(generator.integers(3, size=(30, 2))) for _ in range(2)), permutations=99)["p"][0]
        for _ in range(100)
    ]

    assert 0.35 < np.mean(p_values) < 0.65
    assert np.mean(np.array(p_values) <= 0.1) < 0.2


def test_groups_have_their_own_distances():
    chosen = np.array([[0], [0], [1], [1]] * 20)
    control = np.array([[0], [0], [0], [0]] * 20)
    groups = pd.Series([0, 0, 1, 1] * 20)
    found = map_differences(decisions(chosen), decisions(control), groups).set_index("group")

    assert found["distance"].tolist() == pytest.approx([0, 1])
    assert found.loc[0, "p"] == 1.0
    assert found.loc[1, "p"] < 0.001
    assert found["texts"].tolist() == [40, 40]


@pytest.mark.parametrize("control", [[[0, 0]], [[0], [0]]])
def test_both_must_decide_at_the_same_places(control):
    with pytest.raises(LamellaError, match="in common"):
        map_differences(decisions([[0, 0], [0, 0]]), decisions(control))
