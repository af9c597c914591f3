"""The forward context: what the layers of one running forward share, and what holds for a forward that starts now.

Each thread has one, which says which stack of which tracked model is running in it: no forward is suspended, so that
tasks of one thread cannot meet there, and torch's compiler can trace what is read and written. A module that ended by
an exception, of whatever kind, runs no more, and what it put there is taken away by whoever looks next. What ``with``
statements say about prompts and losses is kept in ``lamella.routing.statements``.
"""

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lamella.errors import LamellaError
from lamella.routing.balance import CollectedLoss
from lamella.routing.calls import Observer, RoutedCall, RouterKey, TrackedModel
from lamella.routing.decision import Decision, Projection
from lamella.routing.documents import Documents, Packing, Places, Rows, Sequences, watch_for_mixing
from lamella.routing.masks import hides_some, real_by_block, rows_of_mask
from lamella.routing.prompt import Generation, Prompt, Readable, find_readable, prompt_of, say_unknown
from lamella.routing.statements import Statements

_SAY_IT = "Give the model an attention_mask, 1 for real tokens, under that name, or batches without padding."


@dataclass(frozen=True, eq=False)
class Frame:
    """What the layers of one running stack see.

    Attributes:
        call: the forward this stack runs in.
        mask: True for the stack's real tokens, ``(batch, tokens so far)``; None when all are real.
        encoder_mask: the same for the encoder states that cross-attention reads.
        parent: the frame around this one in the same call.
        stack: the module whose forward it is for.
        checkpointed: whether the block runs inside gradient checkpointing.
        recomputing: whether this is the recomputation of a checkpointed block.
        given: what the stack was given to read: token ids, embeddings or pixels.
        width: how many token ids the stack itself was given per row; None where it was given something else.
        packing: what its arguments say of the documents in its rows.
        unread: arguments that may say which tokens are padding, and are not understood, by name.
        projections: what one layer computed for a sibling with the same input, by that layer and adapter.
        decisions: those that several layers of the stack share.
        alone: where a block runs with one expert at a time, for which router and which expert this run is.
        of_stack: the stack's own frame, where this one is of a block that is given other tokens than the stack.
        of_blocks: what such blocks' masks say, by mask and rows, each with its mask so that it stays the same object.
    """

    call: RoutedCall
    mask: Tensor | None
    encoder_mask: Tensor | None
    parent: "Frame | None" = None
    stack: nn.Module | None = None
    checkpointed: bool = False
    recomputing: bool = False
    given: Tensor | None = None
    width: int | None = None
    packing: Packing = field(default_factory=lambda: Packing({}))
    unread: Mapping[str, Tensor] = field(default_factory=dict)
    projections: dict[tuple[nn.Module, str], Projection] = field(default_factory=dict)
    decisions: dict[RouterKey, Decision] = field(default_factory=dict)
    alone: tuple[RouterKey, int] | None = None
    of_stack: "Frame | None" = None
    of_blocks: dict[tuple[int, torch.Size], tuple[Any, Tensor | None, Packing]] = field(default_factory=dict)

    def again(self, **changes: Any) -> "Frame":
        """The same stack for a block that runs once more, with nothing computed for siblings yet."""
        return replace(self, **{"projections": {}, "decisions": {}, **changes})

    def of_block(self, states: Tensor, arguments: Mapping[str, Any], takes_mask: bool) -> "Frame":
        """What the layers of a block see: the same, unless it is given other tokens and says which of them are real.

        So are frames of sound, patches, or words that the model has pooled, padded or put something beside.

        Args:
            states: what the block maps, ``(batch, tokens, features)``.
            arguments: all that it is given, by name.
            takes_mask: whether it can be given an attention mask, so that where there is none nothing is hidden.
        """
        rows, mask = states.shape[:2], arguments.get("attention_mask")
        is_padded_inside = mask is None and self.width is not None and rows[1] > self.width
        # A stack that is given pixels may be told by another name which patches are padding.
        is_told = self._has_tokens(rows) and (self.mask is not None or self.width is not None or mask is None)
        if is_told or not takes_mask or is_padded_inside:
            return self
        key = (id(mask), rows)
        if key not in self.of_blocks:
            self.of_blocks[key] = (mask, real_by_block(mask, states), Packing(arguments))
        _, real, packing = self.of_blocks[key]
        if real is None or (self.mask is None and not packing.speaks):
            return self
        return replace(self, mask=real, packing=packing, of_stack=self)

    def _has_tokens(self, rows: torch.Size) -> bool:
        """Whether rows ``(batch, tokens)`` are known to be those that the stack was given."""
        if self.mask is not None:
            return rows_of_mask(self._new_tokens(self.mask, of_encoder=False), rows) is not None
        given = self.given
        return given is not None and given.dim() in (2, 3) and rows in (given.shape[:2], given.shape[1::-1])

    def real_tokens(self, x: Tensor) -> Tensor:
        """Which tokens of ``x (batch, tokens, features)`` are real, ``(batch, tokens)``."""
        found = self.token_mask(x)
        if found is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return found.view(x.shape[:2]).to(x.device)

    def _refuse_other_rows(self, x: Tensor) -> None:
        """Raises where padding would be read, since nobody knows which tokens the rows of ``x`` are."""
        mask = self.mask
        if mask is None:
            if (unread := self._not_understood(x.shape[:2])) is not None:
                raise LamellaError(f"{unread}, and a decision for a whole sequence is not to read it. {_SAY_IT}")
            return
        tokens = self._new_tokens(mask, of_encoder=False).shape
        is_turned = tokens[0] != tokens[1] and x.shape[:2] == tokens[::-1]
        if (not is_turned and self.token_mask(x) is not None) or bool(mask.all()):
            return
        raise LamellaError(
            f"{type(self.stack).__name__} decides for whole sequences by {tuple(x.shape[:2])} rows, which are not its "
            f"{tuple(mask.shape)} tokens (sequences, tokens), so that padding would be read. Give batches without "
            "padding, or decide by token (granularity='token', router_input='token')."
        )

    def _not_understood(self, rows: torch.Size) -> str | None:
        """In words, whether an argument that is not understood may say that some of these rows are padding."""
        unread = next((name for name, value in self.unread.items() if hides_some(value, rows)), None)
        if unread is None:
            return None
        return f"{type(self.stack).__name__} is given {unread!r}, which may say that some tokens are padding"

    @property
    def is_traced(self) -> bool:
        """Whether it is compiled, and nothing outside it says anything of its sequences, all of which begin in it."""
        call = self.call
        return torch.compiler.is_compiling() and call.prompt is None and call.generation is None and call.past == 0

    def sequences(self, x: Tensor, traced: bool = False) -> Sequences:
        """The sequences of ``x (batch, tokens, features)``; where it can be, `Places` in code that is ``traced``.

        Raises:
            LamellaError: the stack is given documents packed into rows, and these are other rows.
        """
        sequences, stack, tracker = self.packing.sequences(self.real_tokens(x), traced), self.stack, self.call.tracker
        if isinstance(sequences, Documents) and not isinstance(sequences, Places) and stack is not None:
            about = f"documents in {'training' if stack.training else 'evaluation'}"
            if about not in tracker.said:
                tracker.said.add(about)
                warn = functools.partial(tracker.say_once, "documents")
                watch_for_mixing(stack, sequences, self.packing.spans_rows, self._still_runs, warn)
        return sequences

    def _still_runs(self) -> bool:
        running = current_frame()
        return running is not None and running.call is self.call

    def readable(self, x: Tensor, decoder: bool, prompt_tokens: int, traced: bool = False) -> Readable:
        """What a decision for a whole sequence of ``x (batch, tokens, features)`` may read.

        All of it in an encoder and in a model that answers about its whole input, otherwise the prompt alone. The
        sequences are as of `sequences`.
        """
        self._refuse_other_rows(x)
        real, sequences, call = self.real_tokens(x), self.sequences(x, traced), self.call
        if not decoder or call.tracker.whole_input:
            return Readable(real, None, sequences)
        before = self._put_before(real, sequences)
        behind = Rows(len(real)) if before else sequences
        readable = find_readable(real[:, before:], call.prompt, call.given, prompt_tokens, behind).after(before)
        if readable.unknown:
            about, warning = say_unknown(readable, call.given is not None, prompt_tokens)
            call.tracker.say_once(about, warning)
        return readable

    def _put_before(self, real: Tensor, sequences: Sequences) -> int:
        """How many tokens, all real, a decoder puts before those that it was given, as some do with an image's.

        Raises:
            LamellaError: its blocks are given other tokens, but not in that order.
        """
        if self.of_stack is None or self.width is None:
            return 0
        before = real.shape[1] - self.width
        given = self.of_stack.real_tokens(real[:, max(before, 0) :, None])
        if before < 0 or sequences.packed or not torch.equal(real, torch.cat([real[:, :before] | True, given], dim=1)):
            raise LamellaError(
                f"The blocks of {type(self.stack).__name__} are given {real.shape[1]} tokens where it was given "
                f"{self.width}, and nothing says where among them a prompt ends, which is what a decision for a whole "
                "sequence reads. Use granularity='token', or MoLA."
            )
        return before

    def readable_so_far(self, x: Tensor, decoder: bool, prompt_tokens: int) -> Readable:
        """What it could read in a forward of all that the sequences have had so far, ``x`` being their last tokens."""
        call, tokens = self.call, self.call.past + x.shape[1]
        real = torch.ones(x.shape[0], tokens, dtype=torch.bool, device=x.device)
        if self.mask is not None and len(self.mask) == len(x):
            told = self.mask[:, -tokens:].to(x.device)
            real[:, tokens - told.shape[1] :] = told
        if not decoder or call.tracker.whole_input:
            return Readable(real, None, Rows(len(real)))
        given = None if call.given is None else call.given.after(call.past)
        return find_readable(real, call.prompt, given, prompt_tokens)

    def token_mask(self, x: Tensor, of_encoder: bool = False, name: str | None = None) -> Tensor | None:
        """Which rows of ``x`` flattened to ``(N, features)`` are real, ``(N,)``; None when all are, or none says.

        With a cache the mask is as long as the sequence so far and ``x`` holds its last tokens.

        Where a module is named, it is said once that padding counts in rows that cannot be told to be which tokens.
        """
        mask = self.encoder_mask if of_encoder else self.mask
        if mask is None:
            if name is not None and self.unread and (unread := self._not_understood(x.shape[:-1])) is not None:
                self.call.tracker.say_once("unread", f"{unread}, and balance loss and trace count them. {_SAY_IT}")
            return None
        new = self._new_tokens(mask, of_encoder)
        found = rows_of_mask(new, x.shape[:-1])
        if found is not None and name is not None:
            found = self._turned(found, new, name)
        if found is None and not of_encoder:
            found = self._subsampled(mask, x)
        is_pooled = x.shape[:-1] == mask.shape[:1]  # one row for each sequence, as what a classifier reads
        if found is None and name is not None and not is_pooled and not bool(mask.all()):
            self.call.tracker.say_once(
                "other rows",
                f"{name} is given {tuple(x.shape[:-1])} rows, which are not one for each of {tuple(mask.shape)} tokens "
                "(sequences, tokens), so that its balance loss and trace count all of them, padding too. Leave such "
                "modules out of target_modules, or give batches without padding.",
            )
        return None if found is None else found.flatten()

    def _turned(self, found: Tensor, new: Tensor, name: str) -> Tensor:
        """A mask laid out for a module's rows, where as many sequences as tokens do not tell which axis is which."""
        known = self.call.tracker.turned
        if new.shape[0] != new.shape[1]:
            known[name] = found.shape != new.shape
        elif known.get(name, False):
            return found.t()
        elif name not in known and len(new) > 1 and not bool(new.all()):
            self.call.tracker.say_once(
                "square",
                f"A batch has as many sequences as tokens ({len(new)}), and no other has shown which of them is the "
                f"first axis that {name} is given. It is taken for the sequences, by its balance loss and trace.",
            )
        return found

    def _new_tokens(self, mask: Tensor, of_encoder: bool) -> Tensor:
        """The part of a mask that is of this forward's tokens."""
        given = None if of_encoder or self.of_stack is not None else self.given
        if (
            given is None
            or given.dim() not in (2, 3)
            or given.shape[0] != mask.shape[0]
            or given.shape[1] > mask.shape[1]
        ):
            return mask
        return mask[:, mask.shape[1] - given.shape[1] :]

    def _subsampled(self, mask: Tensor, x: Tensor) -> Tensor | None:
        """By what the stack itself makes of a mask over samples of sound: one over frames."""
        reduce = getattr(self.stack, "_get_feature_vector_attention_mask", None)
        if reduce is None or x.dim() != 3 or len(x) != len(mask) or x.shape[1] >= mask.shape[1]:
            return None
        found: Tensor = reduce(x.shape[1], mask.long())
        return found.bool()

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Who wants to see routings: nobody during recomputation, which would count a token twice."""
        return () if self.recomputing else tuple(self.call.tracker.observers)


@dataclass(frozen=True, eq=False)
class Context:
    """What holds here and now.

    Attributes:
        frame: of the stack that is running.
        module: whose forward opened that frame.
        runs_in: the interpreter's frame of that forward; None where a ``with`` statement guards the frame, or where the
            forward is compiled, which has none of its own.
        around: the context before that forward began.
        generation: the ``generate`` that a forward runs in that starts now.
    """

    frame: Frame | None = None
    module: nn.Module | None = None
    runs_in: FrameType | None = None
    around: "Context | None" = None
    generation: Generation | None = None


_NOTHING = Context()


@dataclass(eq=False)
class _Holder:
    """Keeps what holds now: torch's compiler loses what is written to ``threading.local`` where a graph ends."""

    context: Context = _NOTHING


class _Here(threading.local):
    """Each thread's."""

    def __init__(self) -> None:
        self.holder = _Holder()


_HERE = _Here()
_PROMPTS: Statements[Prompt] = Statements()
_COLLECTED: Statements[CollectedLoss] = Statements()


def current_context() -> Context:
    """What holds here and now, without what forwards left behind that an exception has ended."""
    holder = _HERE.holder
    context = holder.context
    while context.runs_in is not None and not _executes(context.runs_in):
        assert context.around is not None
        context = holder.context = context.around
    return context


def current_frame() -> Frame | None:
    """The frame of the stack that is running; None outside a tracked model's forward."""
    return current_context().frame


def calling_frame(tracker: TrackedModel, module: nn.Module) -> Frame | None:
    """The frame around a module's forward that begins now, of the call of its model that it is a part of.

    None where it begins a call: nothing of the model runs here, or the module itself is running already and somebody
    calls it once more from inside.
    """
    context = current_context()
    frame = context.frame
    if frame is None or frame.call.tracker is not tracker:
        return None
    around: Context | None = context
    while around is not None and around.frame is not None and around.frame.call is frame.call:
        if around.module is module:
            return None
        around = around.around
    return frame


def enter(frame: Frame, module: nn.Module, runs_in: FrameType | None) -> None:
    """Says that a module's forward begins, in this frame of the interpreter."""
    around = current_context()
    _HERE.holder.context = Context(frame, module, runs_in, around, around.generation)


def leave(module: nn.Module) -> Frame | None:
    """Says that a module's forward has ended; returns its frame, or None where it has failed."""
    context = current_context()
    if context.module is not module or context.around is None:
        return None
    _HERE.holder.context = context.around
    return context.frame


def _executes(frame: FrameType) -> bool:
    """Whether a frame of the interpreter is still running, in whatever thread.

    Module hooks are not told of a KeyboardInterrupt or SystemExit (``always_call`` is for Exception alone), so that
    nothing else says it. Python lets nobody clear a frame that runs.
    """
    if torch.compiler.is_dynamo_compiling():  # what is being traced, runs
        return True
    try:
        frame.clear()
    except RuntimeError:
        return True
    return False


@contextmanager
def in_frame(frame: Frame) -> Iterator[None]:
    """Runs part of a stack once more in a frame of its own."""
    with _saying(frame=frame, module=None, runs_in=None):
        yield


@contextmanager
def prompt(lengths: Sequence[int] | Tensor) -> Iterator[None]:
    """States how long the prompts are, for the forwards inside the context.

    Decisions for whole sequences on a decoder read the prompt alone. ``generate`` and labels tell where it ends; use
    this where neither does, such as in scoring a continuation by its logits.

    Args:
        lengths: real tokens of each sequence's prompt, one per row of the batch; 0 where there is none. With several
            rows per sequence (beams, samples) the rows of a sequence follow each other.

    Raises:
        LamellaError: a length below 0, or not a flat list of whole numbers.
    """
    with _PROMPTS.saying(prompt_of(lengths)):
        yield


def stated_prompt() -> Prompt | None:
    """What ``lamella.prompt`` says about the prompts of a forward that starts here and now."""
    return _PROMPTS.latest()


@contextmanager
def generating(generation: Generation) -> Iterator[None]:
    """Says that the forwards inside the context belong to one ``generate``."""
    with _saying(generation=generation):
        yield


@contextmanager
def collect_losses() -> Iterator[CollectedLoss]:
    """Returns the layers' losses instead of attaching them, for a training loop that adds them itself."""
    collected = CollectedLoss()
    with _COLLECTED.saying(collected):
        yield collected


def stated_collection() -> CollectedLoss | None:
    """Where the losses go of a forward that starts here and now; None when they are attached."""
    return _COLLECTED.latest()


@contextmanager
def _saying(**changes: Any) -> Iterator[None]:
    before = current_context()
    _HERE.holder.context = replace(before, **changes)
    try:
        yield
    finally:
        _HERE.holder.context = before
