"""On a decoder a decision reads the prompt alone, in training as in generation."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from tests import tiny
from torch import Tensor

import lamella
from lamella import LamellaError

DECODERS = ["gpt2", "llama", "gemma2", "opt", "codegen"]
N = 10


def ids_of(seed: int, rows: int = 2, tokens: int = N) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: PeftModel, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        actual: Tensor = model(input_ids=ids, **more).logits
    return actual


def choices(model: PeftModel, ids: Tensor, **more: Any) -> list[list[int]]:
    with tiny.watch(model) as seen:
        logits(model, ids, **more)
    return [routing.indices[:, 0].tolist() for _, routing, _ in seen]


OPTIONS = [{}, {"granularity": "token"}, {"aggregate": "mode", "top_k": 2}]


@functools.cache
def mixture(name: str, option: int, prompt_tokens: int) -> PeftModel:
    return tiny.molex(tiny.build(name).double(), prompt_tokens=prompt_tokens, **OPTIONS[option]).double()


@pytest.mark.parametrize(
    ("name", "option"),
    [("codegen", 0), ("gpt2", 0), ("llama", 0), ("gemma2", 0), ("opt", 0), ("gpt2", 1), ("llama", 2), ("gemma2", 2)],
)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 999), place=st.integers(0, N - 1), prompt_tokens=st.sampled_from([1, 4, 6]))
def test_where_no_prompt_is_known_no_output_depends_on_a_later_token(
    name: str, option: int, seed: int, place: int, prompt_tokens: int
) -> None:
    model = mixture(name, option, prompt_tokens)
    ids = ids_of(seed)
    changed = ids.clone()
    changed[:, place] = (ids[:, place] - 3 + 7) % (tiny.VOCAB - 3) + 3
    for more in ({}, {"labels": ids}):  # labels from the first token on tell of no prompt
        before, after = logits(model, ids, **more), logits(model, changed, **more)
        torch.testing.assert_close(before[:, :place], after[:, :place], rtol=1e-7, atol=1e-7)
        assert not torch.allclose(before[:, place], after[:, place])


@pytest.mark.parametrize("name", DECODERS)
def test_the_tokens_that_decide_run_without_a_guest(name: str) -> None:
    mixed = tiny.molex(tiny.build(name), prompt_tokens=4, policy="uniform")
    plain = tiny.molex(tiny.build(name), policy="self")
    ids = ids_of(0)
    actual, expected = logits(mixed, ids), logits(plain, ids)
    torch.testing.assert_close(actual[:, :4], expected[:, :4])
    assert not torch.allclose(actual[:, 4], expected[:, 4])
    padded = torch.cat([torch.full((2, 3), tiny.PAD), ids], dim=1)
    mask = (padded != tiny.PAD).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    if name != "opt":
        actual = logits(mixed, padded, attention_mask=mask, position_ids=positions)[:, 3:]
        torch.testing.assert_close(actual[:, :4], expected[:, :4], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(actual[:, 4], expected[:, 4])


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 999), width=st.integers(1, N - 1))
def test_labels_tell_the_prompt(name: str, seed: int, width: int) -> None:
    model = tiny.molex(tiny.build(name))
    ids = ids_of(seed)
    labels = ids.clone()
    labels[:, :width] = -100
    decided = choices(model, ids, labels=labels)
    other = ids_of(seed + 1000)
    changed = torch.cat([ids[:, :width], other[:, width:]], dim=1)
    assert choices(model, changed, labels=labels) == decided, "what is to be predicted must not decide"
    with lamella.prompt([width, width]):
        assert choices(model, ids) == decided
    # the same decisions as generation takes after that prompt
    with tiny.watch(model) as seen:
        model.generate(
            input_ids=ids[:, :width], attention_mask=torch.ones(2, width).long(), max_new_tokens=3, min_new_tokens=3,
            do_sample=False,
        )  # fmt: skip
    assert [routing.indices[:, 0].tolist() for _, routing, _ in seen] == decided


def test_each_sequence_has_a_prompt_of_its_own() -> None:
    model = tiny.molex(tiny.llama(layers=4))
    ids = ids_of(3, rows=3)
    labels = ids.clone()
    for row, width in enumerate((2, 5)):
        labels[row, :width] = -100
    together = choices(model, ids, labels=labels)  # the third has none
    for row in range(3):
        one = choices(model, ids[row : row + 1], labels=labels[row : row + 1])
        assert [decided[row : row + 1] for decided in together] == one
    plain = logits(tiny.molex(tiny.llama(layers=4), policy="self"), ids)
    mixed = logits(tiny.molex(tiny.llama(layers=4), policy="uniform"), ids, labels=labels)
    torch.testing.assert_close(mixed[2, :4], plain[2, :4])
    assert not torch.allclose(mixed[0, 0], plain[0, 0]), "a known prompt runs with its guest"


def test_a_prompt_set_by_the_user_counts_real_tokens_and_wins_over_labels() -> None:
    model = tiny.molex(tiny.llama(layers=4))
    ids = ids_of(4)
    padded = torch.cat([torch.full((2, 3), tiny.PAD), ids], dim=1)
    mask = (padded != tiny.PAD).long()
    with lamella.prompt([2, 5]):
        expected = choices(model, ids, labels=ids)
        assert choices(model, padded, attention_mask=mask) == expected
        assert choices(model, ids.repeat_interleave(2, dim=0)) == [
            [tau for tau in decided for _ in range(2)] for decided in expected
        ]
    with lamella.prompt(torch.tensor([0, 0])):
        assert choices(model, ids) == choices(model, ids, labels=ids)
    with pytest.raises(LamellaError, match=r"3 lengths.*2 sequences"), lamella.prompt([1, 2, 3]):
        logits(model, ids)
    for wrong in ([-1, 2], [[1, 2]], [1.5, 2.0]):
        with pytest.raises(LamellaError, match="one whole number"), lamella.prompt(wrong):
            pass


def test_a_decoders_prompt_in_an_encoder_decoder_is_what_it_starts_from() -> None:
    model = tiny.molex(tiny.t5(layers=4))
    given = tiny.batch(model.get_base_model())
    source = {key: given[key] for key in ("input_ids", "attention_mask")}
    with tiny.watch(model) as seen, torch.no_grad():
        model(**given)
    trained = [routing.indices[:, 0].tolist() for _, routing, _ in seen]
    with tiny.watch(model) as seen:
        model.generate(**source, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert [routing.indices[:, 0].tolist() for _, routing, _ in seen] == trained
    other = {**given, "labels": given["labels"].flip(1).clamp_min(3)}
    with tiny.watch(model) as seen, torch.no_grad():
        model(**other)
    assert [routing.indices[:, 0].tolist() for _, routing, _ in seen] == trained


def test_an_encoder_and_a_classifier_read_all_of_it() -> None:
    for model in (tiny.molex(tiny.bert(layers=4)), tiny.molex(tiny.llama_classifier(layers=4))):
        ids = ids_of(5, rows=40)
        changed = ids.clone()
        changed[:, -1] = (ids[:, -1] - 3 + 7) % (tiny.VOCAB - 3) + 3
        assert choices(model, ids) != choices(model, changed)
        labelled = choices(model, ids, labels=torch.zeros(40, dtype=torch.long))
        assert labelled == choices(model, ids), "labels of whole sequences must not change what a decision reads"


def test_without_a_cache_the_decision_stays_the_prompts() -> None:
    model = tiny.molex(tiny.llama(layers=4))
    ids = ids_of(6, tokens=3)
    with tiny.watch(model) as seen:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, use_cache=False,
            do_sample=False,
        )  # fmt: skip
    decided = [routing.indices.tolist() for _, routing, _ in seen]
    assert len(decided) == 20
    assert decided[4:] == decided[:4] * 4


def test_tokens_cannot_keep_their_guests_in_a_cache() -> None:
    model = tiny.molex(tiny.llama(layers=4), granularity="token")
    ids = ids_of(7)
    with pytest.raises(LamellaError, match=r"granularity='token'.*use_cache=False"):
        model.generate(input_ids=ids, max_new_tokens=2)
    model.generate(input_ids=ids, max_new_tokens=2, use_cache=False)
    cache = model(input_ids=ids).past_key_values  # as in training, where nobody reads it
    with pytest.raises(LamellaError, match="use_cache=False"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_a_cache_filled_without_the_adapter_is_refused() -> None:
    model = tiny.molex(tiny.llama(layers=4))
    ids = ids_of(8)
    with model.disable_adapter():
        cache = model(input_ids=ids).past_key_values
    with pytest.raises(LamellaError, match="without the adapter"):
        model(input_ids=ids[:, :1], past_key_values=cache)
