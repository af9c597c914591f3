"""Rows of which only a part is learned: prompt with completion, and chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lamella.errors import LamellaError
from lamella.lab.data.collating import IGNORED
from lamella.lab.data.task import Row

# token ids, and whether they carry loss
Piece: TypeAlias = tuple[list[int], bool]


def prompt_pieces(prompt: str, completion: str, tokenizer: Any) -> list[Piece]:
    """The prompt without loss, the completion and the end token with it.

    Both are tokenised apart, as at generation, where the prompt stands alone.
    """
    start = list(tokenizer(prompt)["input_ids"])  # with the start token, where the tokenizer writes one
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if end and start[-1:] == end and len(start) > 1:
        start = start[:-1]  # a tokenizer that closes every text would end the row before its completion
    return [(start, False), ([*tokenizer(completion, add_special_tokens=False)["input_ids"], *end], True)]


def message_pieces(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[Piece]:
    """A conversation written by the tokenizer's chat template; only what the assistant says carries loss.

    Each assistant turn is what the template adds to the prompt that generation would see, so the ids of a prompt are
    exactly those at generation.

    Raises:
        LamellaError: the tokenizer has no chat template, or its template rewrites earlier turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise LamellaError(
            f"Rows with messages need a chat template, and the tokenizer {tokenizer.name_or_path or 'given'!r} has "
            "none. Use an instruction-tuned model such as smollm2, set tokenizer.chat_template, or give prompt and "
            "completion columns instead."
        )
    pieces: list[Piece] = []
    written = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (before.startswith(written) and after.startswith(before)):
            raise LamellaError(
                f"The chat template of {tokenizer.name_or_path or 'this tokenizer'!r} writes earlier turns differently "
                "once later ones follow, so what the assistant says cannot be told apart. Give prompt and completion "
                "columns instead."
            )
        said = _up_to_end(after[len(before) :], tokenizer.eos_token)
        pieces.append((_ids(before[len(written) :], tokenizer), False))
        pieces.append((_ids(said, tokenizer), True))
        written = before + said
    return pieces


def _up_to_end(said: str, end: str | None) -> str:
    """Without the line break that templates write after the end token: generation stops before it."""
    return said.rstrip() if end and said.rstrip().endswith(end) else said


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote the special tokens


def cut_pieces(pieces: Sequence[Piece], max_length: int) -> Row:
    """One row of at most `max_length` tokens.

    A single prompt loses its left end, so that its completion stays; a conversation loses its right end.
    """
    if len(pieces) == 2 and not pieces[0][1]:
        (prompt, _), (completion, _) = pieces
        room = max(1, max_length - len(completion))
        pieces = [(prompt[-room:], False), (completion, True)]
    ids = [token for tokens, _ in pieces for token in tokens][:max_length]
    labels = [token if learned else IGNORED for tokens, learned in pieces for token in tokens][:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
