import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.errors import LamellaError
from lamella.lab.robustness.noise import gaussian_noise, replaced_tokens, touched_tokens

SPECIAL = torch.tensor([0, 2, 3])
HIDDEN = 16
TABLE = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0))
WORDS = np.setdiff1d(np.arange(50), [0, 2, 3])


def row_of(number, tokens):
    words = torch.randint(4, 50, (tokens,), generator=torch.Generator().manual_seed(number))
    return torch.cat([torch.tensor([2]), words, torch.tensor([3])])


def batch_of(numbers, side="right", extra=0):
    """Rows of `tokens = 3 + number % 5` words between special tokens, padded to the longest and by `extra`."""
    texts = [row_of(number, 3 + number % 5) for number in numbers]
    width = max(map(len, texts)) + extra
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for at, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[at, place], mask[at, place] = text, 1
    return ids, touched_tokens(ids, mask, SPECIAL)


def gaussian(numbers, sigma=0.5, seed=0, **padding):
    ids, touched = batch_of(numbers, **padding)
    noise = gaussian_noise(TABLE[ids], touched, numbers, sigma, seed)
    return {number: noise[at, touched[at]] for at, number in enumerate(numbers)}


def replaced(numbers, probability=0.5, seed=0, **padding):
    ids, touched = batch_of(numbers, **padding)
    changed = replaced_tokens(ids, touched, numbers, probability, seed, WORDS)
    return {number: changed[at, touched[at]] for at, number in enumerate(numbers)}


def test_special_and_padding_tokens_are_not_touched():
    ids, touched = batch_of([0, 4])
    assert touched.sum(1).tolist() == [3, 7]
    assert not touched[ids == 2].any()
    assert not touched[ids == 3].any()
    assert not touched[0, 5:].any()
    noise = gaussian_noise(TABLE[ids], touched, [0, 4], 1.0, 0)
    assert (noise[~touched] == 0).all()
    assert (noise[touched] != 0).all()
    changed = replaced_tokens(ids, touched, [0, 4], 1.0, 0, WORDS)
    assert torch.equal(changed[~touched], ids[~touched])
    assert (changed[touched] != ids[touched]).all()
    assert set(changed[touched].tolist()) <= set(WORDS.tolist())


def test_padding_is_known_by_the_mask_and_not_by_its_id():
    """The pad token of many decoders is one that also ends, or occurs in, a text."""
    ids, mask = torch.tensor([[7, 8, 7, 7]]), torch.tensor([[1, 1, 1, 0]])
    assert touched_tokens(ids, mask, SPECIAL).tolist() == [[True, True, True, False]]


def test_without_a_mask_every_ordinary_token_is_touched():
    ids = torch.tensor([[2, 7, 8, 3]])
    assert touched_tokens(ids, None, SPECIAL).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("noise", [gaussian, replaced])
@given(
    mates=st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True),
    side=st.sampled_from(["right", "left"]),
    extra=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_a_row_s_noise_does_not_depend_on_its_batch_or_its_padding(noise, mates, side, extra):
    together = noise(mates, side=side, extra=extra)
    for number in mates:
        assert torch.equal(together[number], noise([number])[number])


@pytest.mark.parametrize("noise", [gaussian, replaced])
def test_seeds_and_rows_differ(noise):
    # rows 1 and 6 are as long as each other
    assert not torch.equal(noise([1])[1], noise([1], seed=1)[1])
    ids, touched = batch_of([1, 1])
    equal_rows = gaussian_noise(TABLE[ids], touched, [1, 6], 0.5, 0)
    assert not torch.equal(equal_rows[0], equal_rows[1])


@given(sigma=st.sampled_from([0.1, 0.5, 1.0, 3.0]), size=st.floats(0.01, 100.0))
@settings(max_examples=20, deadline=None)
def test_the_noise_has_the_size_of_the_row_s_own_embeddings(sigma, size):
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2, 400, 64, generator=generator) * torch.tensor([size, 5 * size])[:, None, None]
    embeddings[:, 300:] *= 1000.0  # not touched, so they do not count
    touched = torch.arange(400).expand(2, 400) < 300
    noise = gaussian_noise(embeddings, touched, [0, 1], sigma, 0)
    for row, rms in enumerate((size, 5 * size)):
        assert noise[row, :300].square().mean().sqrt().item() == pytest.approx(sigma * rms, rel=0.03)
        assert abs(noise[row, :300].mean().item()) < 0.03 * sigma * rms


def test_models_meet_the_same_noise():
    """Other embeddings of the same width change nothing but the noise's size."""
    ids, touched = batch_of([0, 1, 2])
    other = 7.0 * TABLE.flip(0)[ids] + 1.0
    one, two = (gaussian_noise(e, touched, [0, 1, 2], 1.0, 0) for e in (TABLE[ids], other))
    for at in range(3):
        ratio = two[at, touched[at]] / one[at, touched[at]]
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


def test_stronger_noise_is_the_weaker_made_larger():
    torch.testing.assert_close(gaussian([3], sigma=0.8)[3], 4 * gaussian([3], sigma=0.2)[3])
    assert (gaussian([3], sigma=0.0)[3] == 0).all()
    by_probability = {p: replaced([4], probability=p)[4] for p in (0.0, 0.2, 0.6, 1.0)}
    for less, more in ((0.0, 0.2), (0.2, 0.6), (0.6, 1.0)):
        moved = by_probability[less] != by_probability[0.0]
        assert torch.equal(by_probability[more][moved], by_probability[less][moved])
    assert torch.equal(by_probability[0.0], row_of(4, 7)[1:-1])


@pytest.mark.parametrize("probability", [0.05, 0.2, 1.0])
def test_as_many_tokens_are_replaced_as_asked(probability):
    ids = torch.randint(4, 50, (40, 500), generator=torch.Generator().manual_seed(0))
    touched = torch.ones_like(ids).bool()
    changed = replaced_tokens(ids, touched, range(40), probability, 0, WORDS)
    assert (changed != ids).float().mean().item() == pytest.approx(probability, abs=0.01)
    drawn = torch.bincount(changed[changed != ids], minlength=50)[WORDS]
    assert drawn.min() > 0
    assert drawn.max() < 2 * drawn.float().mean() + 20


def test_a_sequence_of_special_tokens_is_left_alone():
    ids = torch.tensor([[2, 3]])
    touched = touched_tokens(ids, None, SPECIAL)
    assert (gaussian_noise(TABLE[ids], touched, [0], 1.0, 0) == 0).all()
    assert torch.equal(replaced_tokens(ids, touched, [0], 1.0, 0, WORDS), ids)


def test_strengths_without_meaning_are_refused():
    ids, touched = batch_of([0])
    for sigma in (-0.1, float("nan")):
        with pytest.raises(LamellaError, match="is not a standard deviation"):
            gaussian_noise(TABLE[ids], touched, [0], sigma, 0)
    with pytest.raises(LamellaError, match=r"1\.2 is not a probability"):
        replaced_tokens(ids, touched, [0], 1.2, 0, WORDS)
    with pytest.raises(LamellaError, match=r"has 1 token\(s\) that are not special"):
        replaced_tokens(ids, touched, [0], 0.5, 0, WORDS[:1])
