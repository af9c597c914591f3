"""Fitting the aligner of a second model on texts that both models read by tokenizers of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lamella import LamellaError
from lamella.tuners.molex import align_guests

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "log", "red", "big"]
LETTERS = sorted(set("".join(WORDS)))


def by_words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 3, **{w: 4 + i for i, w in enumerate(WORDS)}}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def by_letters() -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 3, **{letter: 4 + i for i, letter in enumerate(LETTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    split = pre_tokenizers.Split("", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), split])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def texts(count: int) -> list[str]:
    picks = torch.randint(len(WORDS), (count, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return [" ".join(WORDS[at] for at in row) for row in picks]


def copied(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """The host itself as the second model, with a tokenizer of its own."""
    tiny.bert(layers=3).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_model_beside_itself_is_aligned_by_the_identity(tmp_path: Path) -> None:
    model = tiny.molex(tiny.bert(layers=3), guests_of=copied(tmp_path, by_words())).train()
    aligner: Any = tiny.blocks(model)[0].second_model("default").aligner
    with torch.no_grad():
        aligner.down.weight.normal_()
    left = align_guests(model, texts(80), by_words())
    assert left < 1e-3
    ids = torch.arange(4, 12)[None]
    states = model.get_base_model().bert.embeddings(ids)
    torch.testing.assert_close(aligner.there(states), states, rtol=0, atol=0.1)
    assert model.training, "it is left as it was"
    assert any("lora" in name and p.requires_grad for name, p in model.named_parameters())


def test_tokens_of_two_tokenizers_belong_together_where_they_end(tmp_path: Path) -> None:
    model = tiny.molex(tiny.bert(layers=3), guests_of=copied(tmp_path, by_letters()))
    aligned = align_guests(model, texts(80), by_words())
    assert 0 < aligned < 1  # letters say something of words
    aligner: Any = tiny.blocks(model)[0].second_model("default").aligner
    assert not torch.allclose(aligner.down.weight, torch.eye(tiny.HIDDEN))


def test_what_cannot_be_fitted_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path, by_words())
    for options in ({}, {"guests_of": folder, "guest_aligner": "identity"}):
        with pytest.raises(LamellaError, match="fits a linear aligner"):
            align_guests(tiny.molex(tiny.bert(layers=3), **options), texts(8), by_words())
    model = tiny.molex(tiny.bert(layers=3), guests_of=folder)
    with pytest.raises(LamellaError, match="too few words in common"):
        align_guests(model, [], by_words())
