import math

import pandas as pd
import pytest

from lamella.errors import LamellaError
from lamella.lab.report.heatmap import BANDS, routing_view


def test_a_cell_is_the_share_relative_to_an_even_one_and_the_first_panel_their_mean(trace):
    view = routing_view(trace([2], ["q", "k"], share={(0, "q"): [0.9, 0.1], (0, "k"): [0.6, 0.4]}))
    texts = {panel.name: [cell.text for cell in panel.grids[0].rows[0].cells] for panel in view.panels}
    assert texts == {"mean over modules": ["1.50", "0.50"], "q": ["1.80", "0.20"], "k": ["1.20", "0.80"]}


def test_missing_experts_are_blank_and_entropy_is_a_share_of_its_maximum(trace):
    view = routing_view(trace([2, 4], ["q"], entropy=math.log(2) / 2))
    (panel,) = view.panels
    first, second = panel.grids[0].rows
    assert panel.name == "q"
    assert first.cells[2:] == (None, None)
    assert None not in second.cells
    assert (first.entropy, second.entropy) == (50, 25)


def test_a_layer_of_one_expert_has_no_entropy(trace):
    view = routing_view(trace([1, 1], ["q"]))
    row = view.panels[0].grids[0].rows[0]
    assert (row.cells[0].text, row.entropy, row.words) == ("1.00", None, "one expert")
    assert "nothing was chosen" in view.paragraphs[0]


def test_experts_have_their_names_where_all_layers_call_them_so(trace):
    routing = trace([2, 2], ["q"], share={(0, "q"): [0.9, 0.1]})
    view = routing_view(routing.assign(name=["books", "dvd"] * 2))
    assert view.panels[0].grids[0].experts == ("books", "dvd")
    assert "most used: layer 0, q, expert books (1.80 times" in view.paragraphs[0]
    apart = routing_view(routing.assign(name=["books", "dvd", "books", "law"]))
    assert apart.panels[0].grids[0].experts == ("books", "1")
    assert routing_view(routing.assign(name="")).panels[0].grids[0].experts == ("0", "1")


def test_stacks_are_kept_apart(trace):
    view = routing_view(pd.concat([trace([2], ["q"]), trace([4, 4], ["q", "cross.q"], stack="decoder")]))
    assert [[grid.stack for grid in panel.grids] for panel in view.panels] == [
        ["encoder", "decoder"],
        ["encoder", "decoder"],
        ["decoder"],
    ]
    first, second = view.paragraphs
    assert first.startswith("encoder: 2 experts in 1 modules")
    assert second.startswith("decoder: 16 experts in 4 modules")


def test_unused_experts_are_counted_per_router_and_the_extremes_named(trace):
    view = routing_view(trace([2, 4], ["q", "k"], share={(1, "k"): [0.97, 0.01, 0.01, 0.01]}))
    (words,) = view.paragraphs
    assert words.startswith(
        "12 experts in 4 modules, counted over 4,096 decisions each. 3 of 12 experts get less than a"
    )
    assert "most used: layer 1, k, expert 0 (3.88 times" in words
    assert "No expert gets" in routing_view(trace([2], ["q"])).paragraphs[0]


def test_effective_experts_are_said_once_for_each_router_where_the_trace_has_them(trace):
    routing = trace([2, 4], ["q"])
    assert "(1 / sum" not in routing_view(routing).paragraphs[0]
    known = routing.assign(effective_experts=routing["layer"].map({0: 1.5, 1: 2.0}))
    assert "count by 1.75 experts in the mean" in routing_view(known).paragraphs[0]
    assert routing_view(known).paragraphs[0].endswith("1.50 to 2.00 by router.")
    assert "(1 / sum" not in routing_view(routing.assign(effective_experts=1.0)).paragraphs[0]


def test_a_router_without_tokens_says_so(trace):
    unseen = trace([2], ["q"]).assign(share=math.nan, mean_weight=math.nan, entropy=math.nan)
    row = routing_view(unseen).panels[0].grids[0].rows[0]
    assert (row.words, row.cells[0].text) == ("no tokens", "none")


@pytest.mark.parametrize(
    ("relative", "band"), [(0.0, 0), (0.09, 0), (0.096, 1), (0.5, 2), (1.0, 3), (1.25, 4), (3.9, 5), (8.0, 6)]
)
def test_bands(relative, band, trace):
    frame = trace([8], ["q"], share={(0, "q"): [relative / 8] * 8})
    assert routing_view(frame).panels[0].grids[0].rows[0].cells[0].band == band
    assert len(BANDS) == 7


def test_a_frame_without_its_columns_is_refused_and_an_empty_one_shows_nothing(trace):
    with pytest.raises(LamellaError, match="entropy, tokens"):
        routing_view(trace([2], ["q"]).drop(columns=["entropy", "tokens"]))
    assert routing_view(trace([], [])) is None
