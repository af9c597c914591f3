"""One forward of a model, and what outlives it on the model: the scale of its losses, its decisions, who listens."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from lamella.compiling import eagerly, known_when_traced
from lamella.errors import LamellaError
from lamella.routing.balance import CollectedLoss, JointBalance
from lamella.routing.decision import CachedDecision, Override, SharedDecision
from lamella.routing.prompt import Generation, Given, Prompt
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

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Inside the context, somebody sees the routings of the model's own code."""
        self.observers.append(observer)
        try:
            with eagerly():
                yield
        finally:
            self.observers.remove(observer)

    @known_when_traced  # nothing: it is said when the model is compiled
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
        joins: whether what is collected is joined to its outputs, since the call is compiled.
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
        used: layers with whose weight something around them has computed.
        read: layers whose weight a module around them has read, which may have computed with it itself.
        called: layers that have run.
    """

    tracker: TrackedModel
    label_share: Tensor | float = 1.0
    decoder_mask: Tensor | None = None
    half: bool = False
    collected: CollectedLoss | None = None
    joins: bool = False
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
    used: list[nn.Module] = field(default_factory=list)
    read: list[nn.Module] = field(default_factory=list)
    called: set[nn.Module] = field(default_factory=set)

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
