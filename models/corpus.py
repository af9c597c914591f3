"""Prose of several kinds, by document, and a tokenizer of it: what models are made from, and what is held out."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lamella.errors import LamellaError
from lamella.lab.data import Task, load_task
from lamella.texts.encoding import packed_blocks

END = "<|end|>"


def prose(kind: str) -> Task:
    """A task of running text, or of prompts and completions, such as ``news`` or ``dialogue``.

    Raises:
        LamellaError: the task is unknown or is not text for a language model.
    """
    task = load_task(kind)
    if task.kind != "causal-lm" or "messages" in task.splits["train"].column_names:
        raise LamellaError(f"{kind} is a {task.kind} task. Models are made from prose, for instance news or glosses.")
    return task


def documents(task: Task, split: str, characters: int, seed: int = 0) -> list[str]:
    """Documents of one kind of prose, in random order, until they hold so many characters.

    Args:
        task: as `prose` gives it.
        split: "train", "validation" or "test"; a document is in one of them.
        characters: at least so many, or all there are.
        seed: of the order, and so of what is taken.
    """
    texts = ["".join(row.values()) for row in task.splits[split]]
    random.Random(f"{seed} {split}").shuffle(texts)
    taken, held = [], 0
    for text in texts:
        if held >= characters:
            break
        taken.append(text)
        held += len(text)
    return taken


def token_blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block: int) -> torch.Tensor:
    """The texts' tokens, each text closed by the end token, joined and cut: ``(blocks, block)``, int64.

    Raises:
        LamellaError: the texts hold less than one block.
    """
    end = tokenizer.eos_token_id
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    rows, _ = packed_blocks([[*document, end] for document in ids], block)
    if not rows:
        raise LamellaError(f"{len(texts)} texts hold less than one block of {block} tokens. Ask for more characters.")
    return torch.tensor([row["input_ids"] for row in rows])


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ``vocabulary`` entries, the end token among them; it knows every byte.

    Args:
        texts: what it is trained on, in an order that decides ties.
        vocabulary: entries, at least 257.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
