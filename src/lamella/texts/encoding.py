"""From rows of text to token ids and labels, for every kind of row.

A label of -100 carries no loss. All real tokens of prose carry it, only the completion of a prompt, only what the
assistant says in a chat, only the target of seq2seq rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

from lamella.errors import LamellaError
from lamella.texts.collating import IGNORED
from lamella.texts.rows import Row, TaskKind

# token ids, and whether they carry loss
Piece: TypeAlias = tuple[list[int], bool]


@dataclass(frozen=True)
class RowEncoder:
    """Rows of one kind as token ids and labels.

    Attributes:
        kind: of the rows.
        name: what an error calls them.
        tokenizer: of the model.
        max_length: longest row, in tokens. Prompts are cut on their left, everything else on its right.
        packing: prose only: join all rows and cut blocks of exactly ``max_length`` tokens.
        decoder: whether the model is a decoder without an encoder, which decides how multiple choice and seq2seq are
            written. None: a tokenizer without mask token is a decoder's in multiple choice; seq2seq means an
            encoder-decoder.
    """

    kind: TaskKind
    name: str
    tokenizer: Any
    max_length: int
    packing: bool = False
    decoder: bool | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise LamellaError(
                f"max_length={self.max_length} leaves no room for a token and its successor. Use at least 2."
            )

    def __call__(self, rows: list[Row], split: str, *, evaluation: bool = False) -> tuple[list[Row], list[str]]:
        """Encoded rows of a split, and notes on what was cut or dropped.

        Evaluation rows of multiple choice on a decoder are one option each, with the index of the question in ``row``,
        of the option in ``choice`` and of the right one in ``answer``.

        Raises:
            LamellaError: no row is left, a tokenizer without chat template, or rows that cannot be used.
        """
        encoded, notes = self._encode(rows, evaluation)
        if not encoded:
            raise LamellaError(
                f"No row of {self.name}'s {split} split is left after encoding at max_length={self.max_length}: "
                f"{'; '.join(notes) or 'too little text'}. Raise max_length or give more rows."
            )
        return encoded, notes

    def _encode(self, rows: list[Row], evaluation: bool) -> tuple[list[Row], list[str]]:
        kind = self.kind
        if kind in ("classification", "pair-classification", "regression"):
            return self._labelled(rows)
        if kind == "multiple-choice":
            as_decoder = self.tokenizer.mask_token is None if self.decoder is None else self.decoder
            return self._options(rows, evaluation) if as_decoder else self._choices(rows)
        if kind == "seq2seq":
            if self.decoder:
                return self._completions(
                    [prompt_pieces(f"{row['source']}\n", row["target"], self.tokenizer) for row in rows]
                )
            return self._seq2seq(rows)
        if "messages" in rows[0]:
            return self._completions([message_pieces(row["messages"], self.tokenizer) for row in rows])
        if "prompt" in rows[0]:
            return self._completions([prompt_pieces(row["prompt"], row["completion"], self.tokenizer) for row in rows])
        return self._prose(rows)

    def _tokens(self, *texts: list[str]) -> list[Row]:
        """Token rows with every column the model takes."""
        columns = self.tokenizer(*texts, truncation=True, max_length=self.max_length, return_attention_mask=True)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _full(self, rows: list[Row]) -> list[str]:
        full = sum(len(row["input_ids"]) >= self.max_length for row in rows)
        return [f"{full:,} of {len(rows):,} rows fill all {self.max_length} tokens; longer text is cut"] if full else []

    def _labelled(self, rows: list[Row]) -> tuple[list[Row], list[str]]:
        columns = [column for column in ("text", "text1", "text2") if column in rows[0]]
        encoded = self._tokens(*([row[column] for row in rows] for column in columns))
        for made, row in zip(encoded, rows, strict=True):
            made["labels"] = row["label"]
        return encoded, self._full(encoded)

    def _choices(self, rows: list[Row]) -> tuple[list[Row], list[str]]:
        """One row holds C sequences; the head scores each and picks one."""
        sizes = {len(row["choices"]) for row in rows}
        if len(sizes) > 1:
            raise LamellaError(
                f"Rows of {self.name} have {min(sizes)} to {max(sizes)} choices; an encoder's multiple-choice "
                "head compares the same number in every row of a batch. Use a decoder, which scores options one by one."
            )
        size = sizes.pop()
        questions = [row["question"] for row in rows for _ in range(size)]
        flat = self._tokens(questions, [choice for row in rows for choice in row["choices"]])
        encoded = []
        for index, row in enumerate(rows):
            options = flat[index * size : (index + 1) * size]
            encoded.append({column: [option[column] for option in options] for column in options[0]})
            encoded[-1]["labels"] = row["label"]
        return encoded, self._full(flat)

    def _options(self, rows: list[Row], evaluation: bool) -> tuple[list[Row], list[str]]:
        """Options as completions of the question: the right one in training, each one in evaluation."""
        pieces, facts = [], []
        for index, row in enumerate(rows):
            for choice, text in enumerate(row["choices"]):
                if evaluation or choice == row["label"]:
                    pieces.append(prompt_pieces(f"{row['question']}\nAnswer:", f" {text}", self.tokenizer))
                    facts.append({"row": index, "choice": choice, "answer": row["label"]})
        encoded, notes = self._completions(pieces)
        if evaluation:
            encoded = [{**made, **fact} for made, fact in zip(encoded, facts, strict=True)]
        return encoded, notes

    def _completions(self, pieces: list[list[Piece]]) -> tuple[list[Row], list[str]]:
        made = [cut_pieces(row, self.max_length) for row in pieces]
        encoded = [row for row in made if any(label >= 0 for label in row["labels"])]
        notes = self._full(encoded)
        if len(encoded) < len(made):
            notes.append(f"{len(made) - len(encoded):,} rows dropped: nothing to learn within {self.max_length} tokens")
        return encoded, notes

    def _seq2seq(self, rows: list[Row]) -> tuple[list[Row], list[str]]:
        encoded = self._tokens([row["source"] for row in rows])
        targets = self.tokenizer(
            text_target=[row["target"] for row in rows], truncation=True, max_length=self.max_length
        )["input_ids"]
        for made, target in zip(encoded, targets, strict=True):
            made["labels"] = list(target)
        return encoded, self._full(encoded)

    def _prose(self, rows: list[Row]) -> tuple[list[Row], list[str]]:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        documents = self.tokenizer([row["text"] for row in rows], return_attention_mask=False)["input_ids"]
        documents = [ids if ids[-1:] == end else [*ids, *end] for ids in documents]
        if self.packing:
            return packed_blocks(documents, self.max_length)
        encoded = [ids[: self.max_length] for ids in documents if len(ids) > 1]
        cut = sum(max(0, len(ids) - self.max_length) for ids in documents)
        notes = [f"{cut:,} tokens beyond the first {self.max_length} of a text cut (packing keeps them)"] if cut else []
        return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)} for ids in encoded], notes


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
        LamellaError: the tokenizer has no chat template, or its template refuses a turn or rewrites earlier ones.
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
        before = _written(messages[:index], tokenizer, add_generation_prompt=True)
        after = _written(messages[: index + 1], tokenizer)
        if not (before.startswith(written) and after.startswith(before)):
            raise LamellaError(
                f"The chat template of {tokenizer.name_or_path or 'this tokenizer'!r} writes earlier turns differently "
                "once later ones follow, so what the assistant says cannot be found in them. Give prompt and "
                "completion columns instead."
            )
        said = _up_to_end(after[len(before) :], tokenizer.eos_token)
        pieces.append((_ids(before[len(written) :], tokenizer), False))
        pieces.append((_ids(said, tokenizer), True))
        written = before + said
    return pieces


def _written(messages: Sequence[Mapping[str, Any]], tokenizer: Any, **options: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program, and may raise anything
        roles = ", ".join(message["role"] for message in messages) or "none"
        begins = f" that begins {messages[0]['content'][:60]!r}" if messages else ""
        raise LamellaError(
            f"The chat template of {tokenizer.name_or_path or 'this tokenizer'!r} refuses the conversation{begins} "
            f"(turns so far: {roles}): {error}. Change or delete the row, or give prompt and "
            "completion columns instead."
        ) from error


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


def packed_blocks(documents: Sequence[Sequence[int]], block: int) -> tuple[list[Row], list[str]]:
    """Join documents end to end and cut blocks of exactly `block` tokens.

    A block may hold the end of one document and the start of the next, and attends across that border; each document
    closes with the end token where the tokenizer has one. The tokens after the last whole block are dropped.

    Args:
        documents: token ids of each document.
        block: tokens of a block.

    Returns:
        Rows whose labels are their ids, and notes on what was dropped.
    """
    stream = list(chain.from_iterable(documents))
    whole = len(stream) // block * block
    rows: list[Row] = [
        {"input_ids": ids, "attention_mask": [1] * block, "labels": list(ids)}
        for ids in (stream[start : start + block] for start in range(0, whole, block))
    ]
    left = len(stream) - whole
    notes = [f"{len(documents):,} texts packed into {len(rows):,} blocks of {block} tokens"]
    if left:
        notes.append(f"the last {left:,} of {len(stream):,} tokens dropped: less than a block")
    return rows, notes
