import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.utils import htmlsafe_json_dumps

from lamella.errors import LamellaError
from lamella.lab.report import TokenLayer, TokenText
from lamella.lab.report.tokenview import MOST_BYTES, MOST_TOKENS, token_view


def text(weights, title="a", name="layer 0", tokens=None):
    tokens = tokens or [f"t{at}" for at in range(len(weights))]
    return TokenText(title, tokens, [TokenLayer(name, len(weights[0]) if len(weights) else 2, weights)])


def test_weights_are_sparse_per_mille_and_fall():
    view = token_view([text([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])])
    assert view.data["texts"] == [{"tokens": ["t0", "t1", "t2"], "weights": [[[2, 750, 0, 250], [1, 1000], []]]}]


def test_shares_and_words_are_over_all_texts_and_routed_tokens():
    (layer,) = token_view([text([[1.0, 0.0], [0.0, 0.0]]), text([[0.5, 0.5]] * 2, "b")]).data["layers"]
    assert layer["shares"] == [667, 333]
    assert layer["words"] == "Expert 0 has the largest weight in 100% of the tokens; expert 1 leads none."
    assert (layer["name"], layer["experts"]) == ("layer 0", 2)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[1, 0], [0, 1]], "every expert leads somewhere."),
        ([[1, 0, 0]], "experts 1 and 2 lead none."),
        ([[1, 0, 0, 0]], "experts 1, 2 and 3 lead none."),
        ([[1] + [0] * 8], "8 of 9 experts lead none."),
        ([[0, 0]], "No token was routed here."),
    ],
)
def test_experts_that_lead_nowhere_are_named(rows, words):
    (layer,) = token_view([text(rows)]).data["layers"]
    assert layer["words"].endswith(words)


def test_a_text_without_a_layer_has_none_there():
    view = token_view([text([[1.0, 0.0]]), text([[1.0]], "b", "layer 1")])
    assert view.layers == ("layer 0", "layer 1")
    assert [len(shown["weights"]) for shown in view.data["texts"]] == [2, 2]
    assert view.data["texts"][0]["weights"][1] is None


def test_no_text_or_no_layer_shows_nothing():
    assert token_view([]) is None
    assert token_view([TokenText("a", ["x"], [])]) is None
    assert token_view([text([])]).data["texts"] == [{"tokens": [], "weights": [[]]}]


def test_ten_thousand_tokens_fit_whole_and_more_are_cut_and_said():
    weights = np.zeros((MOST_TOKENS + 1, 4))
    weights[:, 1] = 1.0
    (whole,) = token_view([text(weights[:-1])]).texts
    assert whole.cut == ""
    view = token_view([text(weights)])
    assert "first 10,000 of 10,001 tokens" in view.texts[0].cut
    assert len(view.data["texts"][0]["tokens"]) == MOST_TOKENS
    assert view.data["layers"][0]["shares"] == [0, 1000, 0, 0]


def test_texts_are_cut_at_one_length_and_short_ones_stay_whole():
    long = np.full((8000, 2), 0.5)
    view = token_view([text(long), text(long, "b"), text(long[:10], "c")])
    lengths = [len(shown["tokens"]) for shown in view.data["texts"]]
    assert lengths == [4995, 4995, 10]
    assert [bool(shown.cut) for shown in view.texts] == [True, True, False]


def test_many_layers_stay_within_the_bytes():
    weights = np.full((5000, 8), 0.125)
    layers = [TokenLayer(f"layer {at}", 8, weights) for at in range(40)]
    view = token_view([TokenText("a", ["<" * 300] * 5000, layers)])
    assert 0.5 * MOST_BYTES < len(htmlsafe_json_dumps(view.data["texts"], separators=(",", ":"))) <= MOST_BYTES
    assert view.texts[0].cut


def test_line_breaks_are_seen_and_a_token_is_never_longer_than_two_lines():
    (shown,) = token_view([text([[1.0]] * 3, tokens=["a\r\n", "\t", "x" * 500])]).data["texts"]
    assert shown["tokens"] == ["a␍↵", "⇥", "x" * 200 + "…"]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([[1.0, np.nan]], "numbers in 0..1"),
        ([[1.0, -0.1]], "numbers in 0..1"),
        ([[1.5, 0.0]], "numbers in 0..1"),
        ([[1.0, 0.0]] * 2, "a weight per expert: 1 by 2"),
        ([[1.0]], "a weight per expert: 1 by 2"),
        ([], "a weight per expert: 1 by 2"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights, words):
    with pytest.raises(LamellaError, match=words):
        token_view([TokenText("a", ["x"], [TokenLayer("layer 0", 2, weights)])])


def test_texts_that_disagree_about_a_layer_are_refused():
    with pytest.raises(LamellaError, match="layer 0 has 2 and 3 experts"):
        token_view([text([[1.0, 0.0]]), text([[1.0, 0.0, 0.0]], "b")])


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=20))
def test_what_is_written_gives_back_the_weights(weights):
    (shown,) = token_view([text(weights)]).data["texts"]
    for written, row in zip(shown["weights"][0], weights, strict=True):
        dense = dict(zip(written[::2], written[1::2], strict=True))
        assert [dense.get(expert, 0) / 1000 for expert in range(3)] == pytest.approx(row, abs=5.1e-4)
        assert written[1::2] == sorted(written[1::2], reverse=True)
