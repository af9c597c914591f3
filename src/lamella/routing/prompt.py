"""Which part of a sequence is given: what a decision for the whole sequence may read on a decoder.

A decision that read what the model has yet to say would leak it in training and be another one in generation. So it
reads the prompt alone: inside ``generate`` the ids given; with labels the tokens before the first one that is to be
predicted; where the user sets it, what ``prompt`` says. Where nothing says, the first few real tokens decide, and they
themselves run without the decision, so that no token's output depends on a later one.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lamella.errors import LamellaError
from lamella.routing.documents import Places, Rows, Sequences


@dataclass(eq=False)
class Prompt:
    """What is known about the prompts of one forward.

    Attributes:
        lengths: real tokens of each sequence's prompt, ``(batch,)``; None inside ``generate``.
        width: positions before this one are the prompt, in every row; None where all that the forward is given is.
        unreadable: why no decision may read it; empty where one may.
    """

    lengths: Tensor | None = None
    width: int | None = None
    unreadable: str = ""


@dataclass(eq=False)
class Beginning:
    """What the sequences of some forwards inside ``generate`` begin with: their prompt.

    Attributes:
        given: ids ``(batch, tokens)`` or embeddings ``(batch, tokens, features)``.
        is_asked: whether ``generate`` was given it, so that no forward is to be given only a part of it.
        drafts: whether the first forward may hold guessed tokens after it.
        seen: how many tokens the last forward had that began so; None where none has.
    """

    given: Tensor
    is_asked: bool = False
    drafts: bool = False
    seen: int | None = None

    @property
    def width(self) -> int:
        """How many tokens it has."""
        return self.given.shape[1]

    def begins(self, given: Tensor) -> bool:
        """Whether a forward without past is given these sequences, with what has been generated since."""
        tokens = given.shape[1]
        if self.seen is not None:
            follows = tokens in (self.seen, self.seen + 1)
        else:
            follows = tokens == self.width or (self.drafts and tokens > self.width)
        return follows and self._agrees(given, self.width)

    def is_cut(self, given: Tensor) -> bool:
        """Whether a forward is given the first part of it alone."""
        return self.is_asked and given.shape[1] < self.width and self._agrees(given, given.shape[1])

    def _agrees(self, given: Tensor, tokens: int) -> bool:
        if given.dim() != self.given.dim() or len(given) % len(self.given):
            return False
        rows = self.given[:, :tokens].repeat_interleave(len(given) // len(self.given), dim=0)  # beams and samples
        return torch.equal(given[:, :tokens], rows.to(given))


@dataclass(eq=False)
class Generation:
    """What one ``generate`` was asked for, and the sequences that its forwards have begun.

    Not every forward inside is of the sequences that it was given: classifier-free guidance has others beside them,
    each with a prompt of its own. So a forward without past is known by what it begins with.

    Attributes:
        beginnings: the prompts that are known.
        source: of an encoder-decoder, what its encoder is given, ``(batch, ...)``.
        drafts: whether a first forward may hold guessed tokens after the prompt.
        number: no two have the same.
    """

    beginnings: list[Beginning]
    source: Tensor | None = None
    drafts: bool = False
    number: int = field(default_factory=itertools.count(1).__next__)

    def prompt_of(self, given: Tensor | None) -> Prompt:
        """The prompt of a forward without past, by what it is given.

        One that is not whole, or that nobody says the end of, is refused only to a decision that would read it.
        """
        if given is None:
            return Prompt()
        known = next((one for one in self.beginnings if one.begins(given)), None)
        if known is None:
            if unreadable := self._unreadable(given):
                return Prompt(unreadable=unreadable)
            known = Beginning(given)
            self.beginnings.append(known)
        known.seen = given.shape[1]
        return Prompt(width=known.width)

    def _unreadable(self, given: Tensor) -> str:
        cut = next((one for one in self.beginnings if one.is_cut(given)), None)
        if cut is not None:
            return (
                f"A decision reads the whole prompt, but generate hands over {given.shape[1]} of its {cut.width} "
                "tokens first. Give it in one forward, or say what decisions are to read (lamella.prompt)."
            )
        if self.drafts:
            return (
                "A decision reads the prompt, and with an assistant the first forward holds guessed tokens after it, "
                "so that nothing tells where it ends. Say it by lamella.prompt, or generate without an assistant."
            )
        return ""


@dataclass(frozen=True)
class Readable:
    """What a decision for a whole sequence may read, and where it is not applied.

    Attributes:
        read: ``(batch, tokens)``, True where the decision looks.
        without: ``(batch, tokens)``, True where the decision has no effect; None where it has one everywhere.
        sequences: those that decide, one in each row or several.
        unknown: in words, which sequences' prompts nothing speaks of; empty for none, or where that is not looked at.
    """

    read: Tensor
    without: Tensor | None
    sequences: Sequences
    unknown: str = ""

    @property
    def extent(self) -> Tensor:
        """How many first tokens of each row's sequence are read, and how many run without the decision, ``(batch, 2)``.

        Both are -1 in a row of several sequences.
        """
        without = torch.zeros_like(self.read) if self.without is None else self.without
        counts = torch.stack([self.read.sum(dim=1), without.sum(dim=1)], dim=1)
        sequences = self.sequences
        return counts.masked_fill(sequences.in_row[:, None], -1) if isinstance(sequences, Places) else counts

    def after(self, tokens: int) -> "Readable":
        """The same of sequences that begin with so many tokens more, all of which are given."""
        if tokens == 0:
            return self
        read, without = self.read, self.without
        read = torch.cat([torch.ones_like(read[:, :1]).expand(-1, tokens), read], dim=1)
        if without is not None:  # what runs without a decision sees those before it, which are then without it too
            without = torch.cat([without.any(dim=1, keepdim=True).expand(-1, tokens), without], dim=1)
        return replace(self, read=read, without=without)


@dataclass(frozen=True, eq=False)
class Given:
    """What a call says of its tokens.

    Attributes:
        predicted: True for tokens that are to be predicted, ``(batch, tokens)``; what is before the first is given.
        separates: whether the first token of a document in a packed row is never said to be predicted, so that where it
            alone is given, nothing is said of a prompt; collators mask its label, which the loss does not use.
        never_first: the same in every row.
    """

    predicted: Tensor
    separates: bool = False
    never_first: bool = False

    def after(self, tokens: int) -> "Given":
        """The same of rows that begin with so many tokens more, of which nothing was to be predicted."""
        before = torch.zeros_like(self.predicted[:, :1]).expand(-1, tokens)
        return replace(self, predicted=torch.cat([before, self.predicted], dim=1))

    def prompt(self, real: Tensor, sequences: Sequences) -> Tensor | None:
        """The tokens of each sequence's prompt, ``(batch, tokens)``; None where it speaks of other tokens."""
        if self.predicted.shape != real.shape:
            return None
        given = real & (sequences.running(self.predicted.to(real.device).long()) == 0)
        least = 2 if self.never_first else 1 + (self.separates and sequences.mixed)
        return given & sequences.spread(sequences.total(given.long()) >= least)


def find_given(arguments: Mapping[str, Any], shifts_labels: bool, is_encoder_decoder: bool) -> Given | None:
    """What the arguments of a model's forward say of its tokens; None where they say nothing.

    Args:
        arguments: its own, and what a data collator may hand on beside them (``completion_mask``, ``assistant_masks``).
        shifts_labels: whether the loss predicts token t+1 at t.
        is_encoder_decoder: whether labels lie one to the left of the decoder's tokens, the first of which is given.
    """
    labels = arguments.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2:
        predicted = labels.ne(-100)
        return Given(_one_later(predicted)) if is_encoder_decoder else Given(predicted, separates=shifts_labels)
    shifted = arguments.get("shift_labels")
    if isinstance(shifted, Tensor) and shifted.dim() == 2:
        return Given(_one_later(shifted.ne(-100)), never_first=True)
    for name in ("completion_mask", "assistant_masks"):
        mask = arguments.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return Given(mask.bool())
    return _by_logits(arguments)


def _one_later(predicted: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(predicted[:, :1]), predicted[:, :-1]], dim=1)


def _by_logits(arguments: Mapping[str, Any]) -> Given | None:
    """By the logits that are asked for: the first of them predicts the token after its own."""
    kept = arguments.get("logits_to_keep")
    named = (arguments.get(name) for name in ("input_ids", "inputs_embeds"))
    given = next((value for value in named if isinstance(value, Tensor) and value.dim() > 1), None)
    if given is None or kept is None:
        return None
    batch, tokens = given.shape[:2]
    if isinstance(kept, Tensor):
        first = int(kept.min()) if kept.numel() else 0
    elif kept > 0:
        first = max(tokens - kept, 0)
    else:
        return None
    return Given((torch.arange(tokens, device=given.device) > first).expand(batch, -1))


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


def find_readable(
    real: Tensor,
    known: Prompt | None,
    given: Given | None,
    prompt_tokens: int,
    sequences: Sequences | None = None,
) -> Readable:
    """What a decision for each whole sequence may read.

    Args:
        real: True for real tokens, ``(batch, tokens)``.
        known: what ``generate`` or ``lamella.prompt`` says.
        given: what the call itself says, by its labels for instance.
        prompt_tokens: how many first real tokens decide where nothing is known.
        sequences: S of them, in these rows; None where each row is one.

    Raises:
        LamellaError: prompts of another number of sequences than there are, rows of several documents in
            ``generate``, or a prompt there that is not whole.
    """
    if known is not None and known.unreadable:
        raise LamellaError(known.unreadable)
    sequences = sequences or Rows(len(real))
    order = sequences.running(real.long())  # (batch, tokens): how many real tokens so far
    first = real & (order <= prompt_tokens)
    prompt = _prompt(real, order, known, given, sequences)
    is_traced = torch.compiler.is_compiling()  # when no number may be looked at
    if prompt is None:
        unknown = "all sequences" if is_traced else f"{sequences.count} of {sequences.count} sequences"
        return Readable(first, first, sequences, unknown)
    has_prompt = sequences.total(prompt.long()) > 0  # (S,)
    missing = None if is_traced else sequences.count - int(has_prompt.sum())
    if missing == 0:
        return Readable(prompt, None, sequences)
    here = sequences.spread(has_prompt)  # (batch, tokens or 1)
    unknown = "" if missing is None else f"{missing} of {sequences.count} sequences"
    return Readable(torch.where(here, prompt, first), first & ~here, sequences, unknown)


def _prompt(
    real: Tensor, order: Tensor, known: Prompt | None, given: Given | None, sequences: Sequences
) -> Tensor | None:
    """The tokens of each sequence's prompt, ``(batch, tokens)``; None where nothing says anything."""
    if known is not None and known.lengths is not None:
        lengths, count = known.lengths.to(real.device), sequences.count
        if len(lengths) == 0 or count % len(lengths) or (sequences.packed and count != len(lengths)):
            holds = f"{count} documents in {len(real)} rows" if sequences.packed else f"{count} sequences"
            raise LamellaError(
                f"lamella.prompt was given {len(lengths)} lengths, but the batch has {holds}; give one per "
                f"{'document' if sequences.packed else 'sequence'}."
            )
        return real & (order <= sequences.spread(lengths.repeat_interleave(count // len(lengths))))
    if known is not None:
        if sequences.packed:
            raise LamellaError(
                f"generate is given {sequences.count} documents packed into {len(real)} rows, which end and go on "
                "together. Give each document a row of its own, with padding on the left."
            )
        position = torch.arange(real.shape[1], device=real.device)
        return real if known.width is None else real & (position < known.width)
    return None if given is None else given.prompt(real, sequences)


def say_unknown(readable: Readable, is_labelled: bool, prompt_tokens: int) -> tuple[str, str]:
    """What to say, and about what, where the prompts of some sequences are unknown."""
    which = readable.unknown
    effect = (
        f"decisions for whole sequences read their first {prompt_tokens} tokens (prompt_tokens), which run without "
        "them, while in generate they read the whole prompt"
    )
    if not is_labelled:
        return "no prompt", (
            f"Nothing in this forward says where the prompts of {which} end, so {effect}. Where there are prompts, "
            "pass labels that are -100 on them, or their completion_mask, or run the forward inside "
            "`with lamella.prompt(lengths):`; a trainer that takes the labels out of the batch (label smoothing, "
            "compute_loss_func) and a harness that scores logits need one of the latter two."
        )
    return "labels from the start", (
        f"In this forward the labels of {which} begin with the text, so that nothing of it is a prompt: {effect}. "
        "Where there are prompts, give them labels of -100 (in TRL completion_only_loss, or assistant_only_loss for "
        "messages), or run the forward inside `with lamella.prompt(lengths):`."
    )
