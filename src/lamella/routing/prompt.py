"""Which part of a sequence is given: what a decision for the whole sequence may read on a decoder.

A decision that read what the model has yet to say would leak it in training and be another one in generation. So it
reads the prompt alone: inside ``generate`` the ids given; with labels the tokens before the first one that is to be
predicted; where the user sets it, what ``prompt`` says. Where nothing says, the first few real tokens decide, and they
themselves run without the decision, so that no token's output depends on a later one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.errors import LamellaError


@dataclass(eq=False)
class Prompt:
    """What is known about the prompts of the forwards inside a context.

    Attributes:
        lengths: real tokens of each sequence's prompt, ``(batch,)``; None inside ``generate``.
        width: positions before this one are the prompt, in every row; None until the first forward tells.
        source: inside ``generate`` of an encoder-decoder, what its encoder is given, ``(batch, ...)``.
    """

    lengths: Tensor | None = None
    width: int | None = None
    source: Tensor | None = None

    @property
    def generating(self) -> bool:
        """Whether it is ``generate`` that says so."""
        return self.lengths is None


@dataclass(frozen=True)
class Readable:
    """What a decision for a whole sequence may read, and where it is not applied.

    Attributes:
        read: ``(batch, tokens)``, True where the decision looks.
        without: ``(batch, tokens)``, True where the decision has no effect; None where it has one everywhere.
        complete: whether nothing that comes later would have been read too.
    """

    read: Tensor
    without: Tensor | None
    complete: bool = True


def prompt_of(lengths: Sequence[int] | Tensor) -> Prompt:
    """What ``lamella.prompt`` says.

    Raises:
        LamellaError: a length below 0, or not a flat list of whole numbers.
    """
    given = torch.as_tensor(lengths)
    if given.dim() != 1 or given.is_floating_point() or given.is_complex() or bool((given < 0).any()):
        raise LamellaError(
            f"lamella.prompt({lengths!r}) needs one whole number of at least 0 per sequence of the batch: the real "
            "tokens of its prompt."
        )
    return Prompt(lengths=given.long())


def find_readable(real: Tensor, known: Prompt | None, label_start: Tensor | None, prompt_tokens: int) -> Readable:
    """What a decision for each whole sequence may read.

    Args:
        real: True for real tokens, ``(batch, tokens)``.
        known: what ``generate`` or ``lamella.prompt`` says.
        label_start: the first position of each sequence that is not given, by its labels, ``(batch,)``.
        prompt_tokens: how many first real tokens decide where nothing is known.

    Raises:
        LamellaError: prompts of another number of sequences than the batch has, or one that comes in parts.
    """
    order = real.cumsum(dim=1)  # (batch, tokens): how many real tokens so far
    given = _given(real, order, known, label_start)
    first = real & (order <= prompt_tokens)
    enough = order[:, -1] >= prompt_tokens  # (batch,)
    if given is None:
        return Readable(first, first, bool(enough.all()))
    has_prompt = given.any(dim=1, keepdim=True)  # (batch, 1)
    if bool(has_prompt.all()):
        return Readable(given, None, _is_whole(order, known))
    complete = _is_whole(order, known) and bool((enough | has_prompt[:, 0]).all())
    return Readable(torch.where(has_prompt, given, first), first & ~has_prompt, complete)


def _is_whole(order: Tensor, known: Prompt | None) -> bool:
    """Whether the prompts that ``lamella.prompt`` speaks of are all there."""
    if known is None or known.lengths is None:
        return True
    lengths = known.lengths.to(order.device)
    return bool((order[:, -1] >= lengths.repeat_interleave(len(order) // len(lengths))).all())


def _given(real: Tensor, order: Tensor, known: Prompt | None, label_start: Tensor | None) -> Tensor | None:
    rows, tokens = real.shape
    if known is not None and known.lengths is not None:
        lengths = known.lengths.to(real.device)
        if len(lengths) == 0 or rows % len(lengths):
            raise LamellaError(
                f"lamella.prompt was given {len(lengths)} lengths, but the batch has {rows} sequences; give one per "
                "sequence."
            )
        return real & (order <= lengths.repeat_interleave(rows // len(lengths))[:, None])
    position = torch.arange(tokens, device=real.device)
    if known is not None:
        if known.width is None:
            known.width = tokens
        if tokens < known.width:
            raise LamellaError(
                f"A decision reads the whole prompt, but generate hands over {tokens} of its {known.width} tokens "
                "first. Generate without prefill_chunk_size, and from an empty cache."
            )
        return real & (position < known.width)
    if label_start is None or len(label_start) != rows:
        return None
    return real & (position < label_start.to(real.device)[:, None])
