"""One layer's sample: uniform, bounded, and the same however the tokens come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import similarity_capture as reference
from torch import Tensor

from lamella.similarity.activations.reservoir import Reservoir

EXPERTS, LAYER = 3, 5


def stream(tokens: int, top_k: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choices, documents, places and values of tokens, fifty a document; a token's value is its number."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :top_k]
    numbers = torch.arange(tokens)
    return indices, numbers // 50, numbers % 50, numbers[:, None].float().expand(-1, 4).contiguous()


def filled(
    parts: list[Tensor], given: tuple[Tensor, ...], per_expert: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Reservoir:
    """A reservoir that was offered tokens in these parts."""
    reservoir = Reservoir.empty(EXPERTS, per_expert, 4, dtype)
    for part in parts:
        indices, rows, positions, x = (tensor[part] for tensor in given)
        reservoir.count(indices, None)
        reservoir.offer(seed, LAYER, indices, torch.ones_like(indices, dtype=torch.bool), rows, positions, x)
    return reservoir


def assert_equal(actual: Reservoir, expected: Reservoir) -> None:
    mine, theirs = actual.packed(), expected.packed()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize(("tokens", "per_expert"), [(30_000, 64), (100, 64), (20, 64), (500, 1)])
def test_it_keeps_what_the_reference_keeps_of_all_keys(tokens, per_expert):
    given = stream(tokens)
    indices, rows, positions, _ = given
    packed = filled(list(torch.arange(tokens).split(333)), given, per_expert, seed=9).packed()
    start = 0
    for expert in range(EXPERTS):
        mine = torch.where((indices == expert).any(dim=1))[0]
        tokens_of = zip(rows[mine].tolist(), positions[mine].tolist(), strict=True)
        expected = reference.smallest(9, LAYER, expert, tokens_of, per_expert)
        part = slice(start, start + int(packed["captured"][expert]))
        actual = zip(*(packed[name][part].tolist() for name in ("keys", "rows", "positions")), strict=True)
        assert list(actual) == expected
        assert packed["inputs"][part, 0].tolist() == [50 * row + position for _, row, position in expected]
        start = part.stop


def test_every_token_is_as_likely_as_any_other():
    tokens, per_expert, draws = 2000, 200, 200
    indices, rows, positions, x = stream(tokens)
    indices = torch.zeros(tokens, 1, dtype=torch.int64)  # all of them to one expert
    drawn = torch.zeros(tokens)
    for seed in range(draws):
        packed = filled(list(torch.arange(tokens).split(700)), (indices, rows, positions, x), per_expert, seed).packed()
        drawn[packed["inputs"][:, 0].long()] += 1
    share = per_expert / tokens
    for counts in (drawn, drawn.view(40, 50).sum(0), drawn.view(40, 50).sum(1)):  # tokens, places, documents
        cells, size = len(counts), tokens // len(counts)
        expected = draws * share * size
        # drawing without replacement: hypergeometric variance
        variance = draws * size * share * (1 - share) * (tokens - size) / (tokens - 1)
        chi_square = float(((counts - expected) ** 2).sum() / variance) * (cells - 1) / cells
        freedom = cells - 1
        assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 300), per_expert=st.integers(1, 80), data=st.randoms())
def test_neither_order_nor_size_of_the_parts_counts(seed, size, per_expert, data):
    given_tokens = stream(240, seed=seed)
    order = list(range(240))
    data.shuffle(order)
    whole = filled([torch.arange(240)], given_tokens, per_expert)
    assert_equal(filled(list(torch.tensor(order).split(size)), given_tokens, per_expert), whole)


def test_two_halves_merge_into_the_whole():
    given = stream(1000)
    whole = filled([torch.arange(1000)], given, 50)
    first, second = (filled([part], given, 50) for part in torch.arange(1000).chunk(2))
    packed = second.packed()
    experts = torch.arange(EXPERTS).repeat_interleave(packed["captured"])[:, None]
    taken = torch.ones_like(experts, dtype=torch.bool)
    first.offer(0, LAYER, experts, taken, packed["rows"], packed["positions"], packed["inputs"])
    for name in ("keys", "rows", "positions", "inputs"):
        assert torch.equal(first.packed()[name], whole.packed()[name])


def test_packing_and_unpacking_goes_on_where_it_was():
    given = stream(600)
    parts = list(torch.arange(600).split(100))
    before = filled(parts[:3], given, 40)
    after = Reservoir.empty(EXPERTS, 40, 4, torch.float32)
    after.unpack({name: tensor.clone() for name, tensor in before.packed().items()})
    for part in parts[3:]:
        indices, rows, positions, x = (tensor[part] for tensor in given)
        after.count(indices, None)
        after.offer(0, LAYER, indices, torch.ones_like(indices, dtype=torch.bool), rows, positions, x)
    assert_equal(after, filled(parts, given, 40))


def test_what_had_no_room_is_counted_and_not_sampled():
    indices, rows, positions, x = stream(100, top_k=1)
    kept = torch.rand(100, 1, generator=torch.Generator().manual_seed(2)) < 0.6
    reservoir = Reservoir.empty(EXPERTS, 200, 4, torch.float32)
    reservoir.count(indices, kept)
    reservoir.offer(0, LAYER, indices, kept, rows, positions, x)
    packed = reservoir.packed()
    assert torch.equal(packed["selected"], torch.bincount(indices.flatten(), minlength=EXPERTS))
    assert torch.equal(packed["selected"] - packed["dropped"], packed["captured"])
    assert sorted(packed["inputs"][:, 0].tolist()) == torch.where(kept[:, 0])[0].tolist()


def test_all_choices_and_pairs_of_choices_are_counted():
    indices = torch.tensor([[0, 1], [0, 2], [1, 0]])
    reservoir = Reservoir.empty(EXPERTS, 2, 4, torch.float32)
    reservoir.count(indices, None)
    assert reservoir.selected.tolist() == [3, 2, 1]
    assert reservoir.together.tolist() == [[3, 2, 1], [2, 2, 0], [1, 0, 1]]
    assert int(reservoir.tokens) == 3


def test_bfloat16_keeps_the_same_tokens_rounded():
    given = stream(1000)
    parts = [torch.arange(1000)]
    full, half = (filled(parts, given, 50, dtype=dtype).packed() for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(full["keys"], half["keys"])
    assert torch.equal(full["inputs"].bfloat16(), half["inputs"])
