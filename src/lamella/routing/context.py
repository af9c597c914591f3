"""The forward context: what the layers of one running forward share, and what holds for a forward that starts now.

There is one context variable for it. Its value says which stack of which tracked model is running. A module that ended
by an exception, of whatever kind, runs no more, and what it put there is taken away by whoever looks next. What
``with`` statements say about prompts and losses is kept in ``lamella.routing.statements``.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from threading import get_ident
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lamella.errors import LamellaError
from lamella.routing.balance import CollectedLoss, JointBalance
from lamella.routing.decision import CachedDecision, Decision, Override, Projection, SharedDecision
from lamella.routing.documents import Documents, Packing, Rows, Sequences, rows_of_mask, watch_for_mixing
from lamella.routing.prompt import Generation, Given, Prompt, Readable, find_readable, prompt_of, say_unknown
from lamella.routing.statements import Statements

Observer = Callable[..., None]
RouterKey = tuple[str, str]  # an adapter, and the router's name in the model
Scale = Callable[[], Tensor | float]

_UNKNOWN_SCALE = (
    "A balance loss is attached with scale 1, since the task loss was not built by the model and no trainer says how "
    "it is scaled. That is right where it goes into the backward pass as it is. Where it is multiplied or divided "
    "first, as for gradient accumulation, run the backward pass inside "
    "`lamella.routing.loss_scale(model, 1 / steps)`."
)


def _nobody_says(shifts_labels: bool) -> Scale | None:
    return None


@dataclass(eq=False)
class TrackedModel:
    """What outlives a call of a model.

    Attributes:
        shifts_labels: whether its loss predicts token t+1 at t, so that the first label counts for nothing.
        whole_input: whether it answers about its whole input instead of continuing it.
        observers: who wants to see routings.
        listeners: who takes part in the beginning and the end of each call.
        overrides: what was said in place of an adapter's routers.
        scales: what the user says of a loss that is built outside the model, the latest last.
        trainers_scale: asks for the same whoever runs a call that begins; it is told ``shifts_labels``.
        said: the warnings that were given, each of which is given once.
        turned: whether a module is given tokens before sequences, by its name, as far as batches have shown.
    """

    shifts_labels: bool = False
    whole_input: bool = False
    observers: list[Observer] = field(default_factory=list)
    listeners: list["CallListener"] = field(default_factory=list)
    overrides: Statements[Override] = field(default_factory=Statements)
    scales: dict[object, float] = field(default_factory=dict)
    trainers_scale: Callable[[bool], Scale | None] = _nobody_says
    said: set[str] = field(default_factory=set)
    turned: dict[str, bool] = field(default_factory=dict)

    def override(self, adapter: str) -> Override:
        """What holds here and now in place of an adapter's routers."""
        return self.overrides_here().get(adapter, Override(adapter))

    def overrides_here(self) -> dict[str, Override]:
        """What holds here and now in place of routers, by adapter."""
        return {override.adapter: override for override in self.overrides.here()}

    def say_once(self, about: str, warning: str) -> None:
        """Warns of something unless it has been said for this model."""
        if about not in self.said:
            self.said.add(about)
            warnings.warn(warning, stacklevel=2)


class CallListener(Protocol):
    """Who takes part in the beginning and the end of each call."""

    def asked(self, generation: Generation, asked: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """A ``generate`` is asked for something; returns the named arguments that it is to run with."""

    def batched(self, model: nn.Module) -> None:
        """Continuous batching of a model is to begin."""

    def opened(self, call: "RoutedCall", arguments: Mapping[str, Any]) -> None:
        """A call begins with these arguments."""

    def closed(self, call: "RoutedCall", output: Any) -> None:
        """It ends with this output; not told where it failed."""


@dataclass(eq=False)
class RoutedCall:
    """One forward of a tracked model.

    Attributes:
        tracker: the model.
        label_share: labels of this batch over the labels the trainer normalises by; 1 where it does not say.
        decoder_mask: where an encoder-decoder has labels, the positions that predict one, ``(batch, tokens)``.
        half: whether the forward ran under fp16 autocast, where an unknown scale cannot be guessed.
        collected: where the layers' own losses go when it ends, instead of being attached.
        losses: those of its layers so far, by module name.
        recorded_scale: the gradient that arrived at ``outputs.loss`` in the backward pass.
        trainers_scale: of a loss that the trainer builds outside the model, where it is known.
        prompt: what ``generate`` or ``lamella.prompt`` says about the prompts.
        generation: the ``generate`` it runs in; None outside.
        given: what its arguments say of which tokens are given and which are to be predicted.
        cache: of the sequences that the forward continues or begins, as it was given.
        foreign: what it was given instead that is none of transformers' caches, by its type; None where nothing.
        past: tokens the cache held when the forward began.
        tokens: those that the forward adds.
        cached: the decisions for those sequences that it brought, and those taken since.
        is_settled: whether those that it brought are known to be those of a forward of the whole sequences.
        is_recalled: whether any of those was used.
        overrides: what holds in place of the routers, by adapter.
        decisions: those that blocks of different stacks share.
        balances: losses that all routers of an adapter have in common, by adapter.
    """

    tracker: TrackedModel
    label_share: Tensor | float = 1.0
    decoder_mask: Tensor | None = None
    half: bool = False
    collected: CollectedLoss | None = None
    losses: list[tuple[str, Tensor]] = field(default_factory=list)
    recorded_scale: Tensor | None = None
    trainers_scale: Scale | None = None
    prompt: Prompt | None = None
    generation: Generation | None = None
    given: Given | None = None
    cache: Any = None
    foreign: str | None = None
    past: int = 0
    tokens: int = 0
    cached: dict[RouterKey, CachedDecision] = field(default_factory=dict)
    is_settled: bool = False
    is_recalled: bool = False
    overrides: dict[str, Override] = field(default_factory=dict)
    decisions: dict[RouterKey, SharedDecision] = field(default_factory=dict)
    balances: dict[str, JointBalance] = field(default_factory=dict)

    def attached_scale(self) -> Tensor | float:
        """The factor of an attached loss: the task loss's own.

        Raises:
            LamellaError: fp16 with a gradient scaler whose scale never passed through the model's loss.
        """
        if self.recorded_scale is not None:
            return self.recorded_scale * self.label_share
        if self.tracker.scales:
            return [*self.tracker.scales.values()][-1]
        if self.trainers_scale is not None:
            return self.trainers_scale()
        if self.half:
            raise LamellaError(
                "A balance loss is attached under fp16, but the loss was not built by the model, so the scale of the "
                "gradient scaler is unknown and the balance loss would be thousands of times too small. Pass labels so "
                "that the model returns its loss, wrap the backward in `lamella.routing.loss_scale(model, scale)`, use "
                "bf16, or set router_aux_loss_coef=0."
            )
        self.tracker.say_once("loss scale", _UNKNOWN_SCALE)
        return 1.0


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
        projections: what one layer computed for a sibling with the same input, by that layer and adapter.
        decisions: those that several layers of the stack share.
        alone: where a block runs with one expert at a time, for which router and which expert this run is.
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
    projections: dict[tuple[nn.Module, str], Projection] = field(default_factory=dict)
    decisions: dict[RouterKey, Decision] = field(default_factory=dict)
    alone: tuple[RouterKey, int] | None = None

    def again(self, **changes: Any) -> "Frame":
        """The same stack for a block that runs once more, with nothing computed for siblings yet."""
        return replace(self, **{"projections": {}, "decisions": {}, **changes})

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
            return
        tokens = self._new_tokens(mask, of_encoder=False).shape
        is_turned = len(set(tokens)) == 2 and x.shape[:2] == tokens[::-1]
        if (not is_turned and self.token_mask(x) is not None) or bool(mask.all()):
            return
        raise LamellaError(
            f"{type(self.stack).__name__} decides for whole sequences by {tuple(x.shape[:2])} rows, which are not its "
            f"{tuple(mask.shape)} tokens (sequences, tokens), so that padding would be read. Give batches without "
            "padding, or decide by token (granularity='token', router_input='token')."
        )

    def sequences(self, x: Tensor) -> Sequences:
        """The sequences of ``x (batch, tokens, features)``.

        Raises:
            LamellaError: the stack is given documents packed into rows, and these are other rows.
        """
        sequences, stack, tracker = self.packing.sequences(self.real_tokens(x)), self.stack, self.call.tracker
        if isinstance(sequences, Documents) and stack is not None:
            about = f"documents in {'training' if stack.training else 'evaluation'}"
            if about not in tracker.said:
                tracker.said.add(about)
                warn = functools.partial(tracker.say_once, "documents")
                watch_for_mixing(stack, sequences, self.packing.spans_rows, self._still_runs, warn)
        return sequences

    def _still_runs(self) -> bool:
        running = current_frame()
        return running is not None and running.call is self.call

    def readable(self, x: Tensor, decoder: bool, prompt_tokens: int) -> Readable:
        """What a decision for a whole sequence of ``x (batch, tokens, features)`` may read.

        All of it in an encoder and in a model that answers about its whole input, otherwise the prompt alone.
        """
        self._refuse_other_rows(x)
        real, sequences, call = self.real_tokens(x), self.sequences(x), self.call
        if not decoder or call.tracker.whole_input:
            return Readable(real, None, sequences)
        readable = find_readable(real, call.prompt, call.given, prompt_tokens, sequences)
        if readable.unknown:
            call.tracker.say_once(*say_unknown(readable, call.given is not None, prompt_tokens))
        return readable

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
            return None
        new = self._new_tokens(mask, of_encoder)
        found = rows_of_mask(new, x.shape[:-1])
        if found is not None and name is not None:
            found = self._turned(found, new, name)
        if found is None and not of_encoder:
            found = self._subsampled(mask, x)
        if found is None and name is not None and not bool(mask.all()):
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
        given = None if of_encoder else self.given
        if given is None or given.dim() not in (2, 3) or len(given) != len(mask) or given.shape[1] > mask.shape[1]:
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
        runs_in: the interpreter's frame of that forward; None where a ``with`` statement guards the frame.
        thread: that runs it.
        around: the context before that forward began.
        generation: the ``generate`` that a forward runs in that starts now.
    """

    frame: Frame | None = None
    module: nn.Module | None = None
    runs_in: FrameType | None = None
    thread: int = 0
    around: "Context | None" = None
    generation: Generation | None = None


_NOTHING = Context()
_CONTEXT: ContextVar[Context] = ContextVar("lamella_context", default=_NOTHING)
_PROMPTS: Statements[Prompt] = Statements()
_COLLECTED: Statements[CollectedLoss] = Statements()


def current_context() -> Context:
    """What holds here and now, without what forwards left behind that an exception has ended."""
    context = _CONTEXT.get()
    if context.runs_in is None or _executes(context.runs_in):
        return context
    while context.runs_in is not None and not _executes(context.runs_in):
        assert context.around is not None
        context = context.around
    _CONTEXT.set(context)
    return context


def current_frame() -> Frame | None:
    """The frame of the stack that is running; None outside a tracked model's forward."""
    return current_context().frame


def calling_frame(tracker: TrackedModel, module: nn.Module) -> Frame | None:
    """The frame around a module's forward that begins now, of the call of its model that it is a part of.

    None where it begins a call: nothing of the model runs, or it runs in another thread (whose context this one was
    given a copy of), or the module itself is running already and somebody calls it once more from inside.
    """
    context = current_context()
    frame = context.frame
    if frame is None or frame.call.tracker is not tracker or context.thread != get_ident():
        return None
    around: Context | None = context
    while around is not None and around.frame is not None and around.frame.call is frame.call:
        if around.module is module:
            return None
        around = around.around
    return frame


def enter(frame: Frame, module: nn.Module, runs_in: FrameType) -> None:
    """Says that a module's forward begins, in this frame of the interpreter."""
    around = current_context()
    entered = replace(around, frame=frame, module=module, runs_in=runs_in, thread=get_ident(), around=around)
    _CONTEXT.set(entered)


def leave(module: nn.Module) -> Frame | None:
    """Says that a module's forward has ended; returns its frame, or None where it has failed."""
    context = current_context()
    if context.module is not module or context.around is None:
        return None
    _CONTEXT.set(context.around)
    return context.frame


def _executes(frame: FrameType) -> bool:
    """Whether a frame of the interpreter is still running, in whatever thread.

    Module hooks are not told of a KeyboardInterrupt or SystemExit (``always_call`` is for Exception alone), so that
    nothing else says it. Python lets nobody clear a frame that runs.
    """
    try:
        frame.clear()
    except RuntimeError:
        return True
    return False


@contextmanager
def in_frame(frame: Frame) -> Iterator[None]:
    """Runs part of a stack once more in a frame of its own."""
    with _saying(frame=frame, module=None, runs_in=None, thread=get_ident()):
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
    token = _CONTEXT.set(replace(current_context(), **changes))
    try:
        yield
    finally:
        _CONTEXT.reset(token)
