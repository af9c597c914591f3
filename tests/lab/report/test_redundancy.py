import numpy as np
import pytest

from lamella.errors import LamellaError
from lamella.lab.report.redundancy import redundancy_view


def test_the_normalised_distance_comes_first_and_both_axes_start_at_zero(redundancy):
    view = redundancy_view(redundancy)
    assert [chart.title.split(":")[0] for chart in view.charts] == ["Normalised", "Raw"]
    assert {chart.y_ticks[0][1] for chart in view.charts} == {"0"}
    assert [line.name for line in view.charts[0].lines] == ["query", "key"]


def test_the_sentence_names_the_most_and_the_least_redundant_layer_by_the_normalised_distance(redundancy):
    # the raw distance would name them the other way round
    frame = redundancy.assign(raw=redundancy["normalised"].max() - redundancy["normalised"])
    assert redundancy_view(frame).sentence == (
        "The experts are most alike in encoder layer 0 (0.500 apart, normalised) "
        "and least alike in encoder layer 2 (1.100)."
    )


def test_one_layer_is_said_alone_and_layers_of_one_expert_are_left_out(redundancy):
    frame = redundancy.assign(normalised=redundancy["normalised"].where(redundancy["layer"] == 1))
    assert redundancy_view(frame).sentence == "The experts of encoder layer 1 are 0.800 apart (normalised)."
    assert redundancy_view(redundancy.assign(normalised=np.nan)) is None


def test_stacks_are_named_where_there_are_two(redundancy):
    frame = redundancy.assign(stack=["encoder", "decoder"] * 3)
    names = [line.name for line in redundancy_view(frame).charts[0].lines]
    assert names == ["encoder · query", "decoder · key"]


def test_a_missing_column_is_refused(redundancy):
    with pytest.raises(LamellaError, match="lacks the columns raw"):
        redundancy_view(redundancy.drop(columns="raw"))
