from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.similarity.activations import Manifest
from lamella.similarity.alignment.tiles import Tile, cut, tile_key
from lamella.similarity.screening import all_pairs

NAME = st.tuples(st.integers(0, 3), st.integers(0, 4))
MANIFEST = Manifest("model 1", None, "text", 0, 64, "float32", ((0, 4), (1, 4)), 16, rows_done=9, text="abc")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAME, NAME), min_size=1), st.integers(1, 30))
def test_every_pair_is_in_one_tile_and_every_source_too(pairs, most):
    tiles = cut(pairs, most)
    assert [pair for tile in tiles for pair in tile.pairs] == sorted(set(pairs))
    sources = [source for tile in tiles for source in tile.sources]
    assert len(sources) == len(set(sources))
    for tile in tiles:
        assert len({layer for layer, _ in tile.sources}) == 1
        assert len(tile.pairs) <= most or len(tile.sources) == 1


def test_tiles_are_filled():
    experts = [(layer, e) for layer in range(3) for e in range(4)]
    assert [len(tile.pairs) for tile in cut(all_pairs(experts), 22)] == [22, 22] * 3
    assert [len(tile.pairs) for tile in cut(all_pairs(experts), 1000)] == [44] * 3
    assert [len(tile.pairs) for tile in cut(all_pairs(experts), 1)] == [11] * 12


def test_a_tile_says_what_it_is():
    tile = Tile((((2, 1), (0, 0)), ((2, 3), (0, 0))))
    assert str(tile) == "experts 1 to 3 of layer 2 as sources, 2 pairs"


@pytest.mark.parametrize(
    "changed",
    [
        {"captures": [replace(MANIFEST, model="model 2")]},
        {"captures": [replace(MANIFEST, text="abd")]},
        {"captures": [replace(MANIFEST, rows_done=10)]},
        {"captures": [MANIFEST, MANIFEST]},
        {"settings": {"steps": 5}},
        {"settings": {"steps": 4, "lr": 0.1}},
        {"dtype": "bfloat16"},
        {"tile": Tile((((0, 1), (0, 3)),))},
    ],
)
def test_the_key_changes_with_all_that_the_result_depends_on(changed):
    given = {"tile": Tile((((0, 1), (0, 2)),)), "captures": [MANIFEST], "settings": {"steps": 4}, "dtype": "float32"}
    assert tile_key(**given) != tile_key(**{**given, **changed})


def test_the_key_does_not_change_with_what_the_result_does_not_depend_on():
    tile = Tile((((0, 1), (0, 2)),))
    moved = replace(MANIFEST, shards="checkpoint-3", complete=True)
    one = tile_key(tile, [MANIFEST], {"steps": 4, "lr": 1}, "float32")
    assert one == tile_key(tile, [moved], {"lr": 1, "steps": 4}, "float32")
