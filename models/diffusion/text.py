"""The text encoder of the pipeline: it has learnt to tell, from a caption's last token, what stands where."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, set_seed

from models.diffusion.captions import WORDS, captions
from models.diffusion.training import seeded, train
from models.diffusion.world import BACKGROUNDS, COLOURS, EVERYTHING, KINDS, PLACES, SHAPES, TEXTURES, Scenes
from models.settings import TextSettings

LENGTH = 32  # tokens of a caption, its beginning and end among them; three objects need 28
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_ATTRIBUTES = (SHAPES, COLOURS, TEXTURES)


def word_tokenizer() -> CLIPTokenizer:
    """One token a word of captions; words that it does not know are read by their letters."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = _merged([*word[:-1], f"{word[-1]}</w>"], merges)
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    letters = [*ascii_lowercase, ",", *(f"{letter}</w>" for letter in (*ascii_lowercase, ","))]
    entries = [*letters, *map("".join, merges), _BEGIN, _END]
    vocabulary = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=LENGTH)


def _merged(pieces: list[str], merges: dict[tuple[str, str], None]) -> list[str]:
    """A word's pieces after these merges, the first ones first, as byte-pair encoding applies them."""
    for pair in merges:
        at = 0
        while at < len(pieces) - 1:
            if (pieces[at], pieces[at + 1]) == pair:
                pieces[at : at + 2] = ["".join(pair)]
            at += 1
    return pieces


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """As the pipeline reads them: ``(texts, 32)``."""
    return tokenizer(list(texts), padding="max_length", max_length=LENGTH, return_tensors="pt")["input_ids"]


def text_config(settings: TextSettings, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Of an encoder that reads what this tokenizer makes."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=LENGTH,
        projection_dim=settings.hidden,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Reader(nn.Module):
    """A text encoder, and what names the background and the object in each place from a caption's last token."""

    def __init__(self, settings: TextSettings, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.encoder = CLIPTextModel(text_config(settings, tokenizer))
        self.choices = [1 + len(words) for words in _ATTRIBUTES for _ in PLACES] + [len(BACKGROUNDS)]
        self.head = nn.Linear(settings.hidden, sum(self.choices))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Logits ``(texts, choices)`` of shapes for each place, then of colours, of textures, and of backgrounds."""
        return self.head(self.encoder(ids).pooler_output).split(self.choices, dim=1)


def answers(scenes: Scenes) -> Tensor:
    """What a reader should name: ``(scenes, 3 attributes x 4 places + 1)``; 0 is nothing but for backgrounds."""
    named = _attributes()[scenes.kinds]  # (scenes, places, attributes)
    return torch.cat([named.transpose(1, 2).flatten(1), scenes.backgrounds[:, None]], dim=1)


def _attributes() -> Tensor:
    """Of each kind the numbers of its shape, colour and texture from 1, of nothing zeros: ``(1 + kinds, 3)``."""
    numbers = itertools.product(*(range(1, 1 + len(words)) for words in _ATTRIBUTES))
    table = torch.tensor([(0, 0, 0), *numbers])
    assert len(table) == 1 + len(KINDS)
    return table


def taught_reader(
    settings: TextSettings, tokenizer: CLIPTokenizer, file: Path, seed: int
) -> tuple[Reader, list[float]]:
    """A reader of captions of everything, taught on scenes and kinds for training; the losses of its steps."""
    set_seed(seed)
    reader = Reader(settings, tokenizer)

    def loss(generator: torch.Generator) -> Tensor:
        scenes = EVERYTHING.draw(settings.pace.batch_size, generator)
        logits = reader(token_ids(tokenizer, captions(scenes, generator)))
        return torch.stack(list(map(cross_entropy, logits, answers(scenes).unbind(1)))).mean()

    return train(reader, loss, settings.pace, file, seed)


@torch.no_grad()
def share_read(reader: Reader, tokenizer: CLIPTokenizer, count: int, seed: int) -> dict[str, float]:
    """The share of captions, of scenes that were kept out, of which a reader names all that stands there."""
    shares = {}
    for name, kinds in {"trained": EVERYTHING.trained, "held_out": EVERYTHING.held_out}.items():
        generator = seeded(seed, "reading", name)
        scenes = EVERYTHING.draw(count, generator, kinds=kinds, kept_out=True)
        logits = reader(token_ids(tokenizer, captions(scenes, generator)))
        found = torch.stack([choice.argmax(dim=1) for choice in logits], dim=1)
        shares[name] = (found == answers(scenes)).all(dim=1).double().mean().item()
    return shares
