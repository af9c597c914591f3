"""What the layers of one forward call share: which tokens are real, how the task loss is scaled, who is watching.

``track_calls`` sets hooks on a model and on the stacks inside it. The outermost one that runs opens a call; each stack
inside it opens a frame with its own attention mask, so that encoder, decoder and cross-attention each see theirs. A
gradient-checkpointed block carries its frame along, so that recomputation in the backward pass sees the same one, also
in another thread. When the forward ends, the frame is gone.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lamella.errors import LamellaError
from lamella.routing.collecting import CollectedLoss, current_collection
from lamella.routing.prompt import (
    Prompt,
    Readable,
    current_prompt,
    find_readable,
    set_prompted_generate,
    unset_prompted_generate,
)

Observer = Callable[..., None]


@dataclass(eq=False)
class RoutedCall:
    """One forward of a tracked model.

    Attributes:
        tracker: the model's tracker.
        label_share: labels of this batch over the labels the trainer normalises by; 1 where it does not say.
        decoder_mask: where an encoder-decoder has labels, the positions that predict one, ``(batch, tokens)``.
        half: whether the forward ran under fp16 autocast, where an unknown scale cannot be guessed.
        collected: where the layers' own losses go instead of being attached.
        recorded_scale: the gradient that arrived at ``outputs.loss`` in the backward pass.
        prompt: what ``generate`` or ``lamella.prompt`` says about the prompts.
        label_start: the first position of the decoder's input that labels say is not given, ``(batch,)``.
        stated: what was stated by hand when it began, by whom it is for.
        shared: what layers of different blocks, stacks and recomputations share; theirs to key.
    """

    tracker: "CallTracker"
    label_share: Tensor | float = 1.0
    decoder_mask: Tensor | None = None
    half: bool = False
    collected: CollectedLoss | None = None
    recorded_scale: Tensor | None = None
    prompt: Prompt | None = None
    label_start: Tensor | None = None
    stated: Mapping[Any, Any] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def generating(self) -> bool:
        """Whether it runs inside ``generate``."""
        return self.prompt is not None and self.prompt.generating

    def attached_scale(self) -> Tensor | float:
        """The factor of an attached loss: the task loss's own.

        Raises:
            LamellaError: fp16 with a gradient scaler whose scale never passed through the model's loss.
        """
        if self.recorded_scale is not None:
            return self.recorded_scale * self.label_share
        if self.tracker.scale is not None:
            return self.tracker.scale
        if self.half:
            raise LamellaError(
                "A balance loss is attached under fp16, but the loss was not built by the model, so the scale of the "
                "gradient scaler is unknown and the balance loss would be thousands of times too small. Pass labels so "
                "that the model returns its loss, add lamella.tuners.loss_scale.LossScaleCallback to the trainer, "
                "wrap the backward in `lamella.routing.loss_scale(model, scale)`, use bf16, or set balance_coef=0."
            )
        return 1.0


@dataclass(frozen=True, eq=False)
class Frame:
    """What the layers of one running stack see.

    Attributes:
        call: the forward this stack runs in.
        mask: True for the stack's real tokens, ``(batch, tokens so far)``; None when all are real.
        encoder_mask: the same for the encoder states that cross-attention reads.
        parent: the frame around this one.
        checkpointed: whether the block runs inside gradient checkpointing.
        recomputing: whether this is the recomputation of a checkpointed block.
        handed_over: products that one layer computed for a sibling with the same input; empty when the stack is done.
        given: what the stack was given to read: token ids, embeddings or pixels.
        alone: where a block is run several times, what this run is for.
    """

    call: RoutedCall
    mask: Tensor | None
    encoder_mask: Tensor | None
    parent: "Frame | None" = None
    checkpointed: bool = False
    recomputing: bool = False
    handed_over: dict[Any, Any] = field(default_factory=dict)
    given: Tensor | None = None
    alone: Any = None

    def real_tokens(self, x: Tensor) -> Tensor:
        """Which tokens of ``x (batch, tokens, features)`` are real, ``(batch, tokens)``."""
        mask = self.token_mask(x)
        if mask is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return mask.view(x.shape[:2]).to(x.device)

    def readable(self, x: Tensor, decoder: bool, prompt_tokens: int) -> Readable:
        """What a decision for a whole sequence of ``x (batch, tokens, features)`` may read.

        All of it in an encoder and in a model that answers about its whole input, otherwise the prompt alone.
        """
        real = self.real_tokens(x)
        if not decoder or self.call.tracker.whole_input:
            return Readable(real, None)
        return find_readable(real, self.call.prompt, self.call.label_start, prompt_tokens)

    def token_mask(self, x: Tensor, of_encoder: bool = False) -> Tensor | None:
        """Which rows of ``x`` flattened to ``(N, features)`` are real, ``(N,)``; None when all are, or none says.

        With a cache the mask is as long as the sequence so far and ``x`` holds its last tokens.
        """
        mask = self.encoder_mask if of_encoder else self.mask
        if mask is None:
            return None
        if x.dim() == 3 and mask.shape[0] == x.shape[0] and mask.shape[1] >= x.shape[1]:
            return mask[:, mask.shape[1] - x.shape[1] :].flatten()
        if x.dim() == 2 and mask.numel() == x.shape[0]:
            return mask.flatten()
        return None

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Who wants to see routings: nobody during recomputation, which would count a token twice."""
        return () if self.recomputing else tuple(self.call.tracker.observers)


_FRAME: ContextVar[Frame | None] = ContextVar("lamella_frame", default=None)


def current_frame() -> Frame | None:
    """The frame of the stack that is running; None outside a tracked model's forward."""
    return _FRAME.get()


@contextmanager
def run_alone(frame: Frame, alone: Any) -> Iterator[None]:
    """Runs part of a stack once more, for something of its own; a recomputation of it sees the same."""
    token = _FRAME.set(replace(frame, alone=alone, handed_over={}))
    try:
        yield
    finally:
        _FRAME.reset(token)


class CallListener(Protocol):
    """Who takes part in the beginning and the end of each call."""

    def opened(self, call: RoutedCall, arguments: Mapping[str, Any]) -> None:
        """A call begins with these arguments."""

    def closed(self, call: RoutedCall, output: Any) -> None:
        """It ends with this output; not told where it failed."""


class CallTracker:
    """The hooks of one model and what outlives a call: observers, listeners, what is stated, a trainer's loss scale.

    ``checkpointed`` are the modules that transformers gives a checkpoint function when checkpointing is enabled;
    ``whole_input`` says that the model answers about its whole input instead of continuing it.
    """

    def __init__(self, shifts_labels: bool, checkpointed: Sequence[nn.Module], whole_input: bool = False) -> None:
        self.shifts_labels = shifts_labels
        self.whole_input = whole_input
        self.checkpointed = checkpointed
        self.observers: list[Observer] = []
        self.listeners: list[CallListener] = []
        self.stated: dict[Any, Any] = {}
        self.scale: float | None = None

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model and of each stack in it."""
        arguments = _named_arguments(module, args, kwargs)
        parent = _FRAME.get()
        if parent is None or parent.call.tracker is not self:
            if module.training:
                _carry_frames(self.checkpointed)
            call = self._start_call(arguments)
            for listener in self.listeners:
                listener.opened(call, arguments)
        else:
            call = parent.call
        _FRAME.set(_frame_of_stack(call, arguments, parent))

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook, run also when the forward raised."""
        frame = _FRAME.get()
        if frame is None or frame.call.tracker is not self:
            return output
        frame.handed_over.clear()
        _FRAME.set(frame.parent)
        if frame.parent is not None and frame.parent.call is frame.call:
            return output
        if output is not None:
            for listener in self.listeners:
                listener.closed(frame.call, output)
        return _record_loss_scale(output, frame.call)

    def _start_call(self, arguments: Mapping[str, Any]) -> RoutedCall:
        labels = arguments.get("labels")
        is_encoder_decoder = "decoder_input_ids" in arguments.get("__parameters__", ())
        predicts = labels.ne(-100) if isinstance(labels, Tensor) and labels.dim() == 2 else None
        return RoutedCall(
            tracker=self,
            label_share=self._label_share(labels, arguments.get("num_items_in_batch")),
            decoder_mask=predicts if is_encoder_decoder else None,
            prompt=current_prompt(),
            stated=dict(self.stated),
            label_start=None if predicts is None else _first_predicted(predicts, is_encoder_decoder),
            collected=current_collection(),
            half=any(
                torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
                for kind in ("cpu", "cuda")
            ),
        )

    def _label_share(self, labels: Any, total: Any) -> Tensor | float:
        if total is None or not isinstance(labels, Tensor):
            return 1.0
        counted = labels[..., 1:] if self.shifts_labels else labels
        return counted.ne(-100).sum() / total


def _first_predicted(predicts: Tensor, is_encoder_decoder: bool) -> Tensor:
    """The first position of a decoder's input that is not given, ``(batch,)``; past the end where nothing is predicted.

    Labels lie at the place of their own token. In an encoder-decoder they lie one to the left of it, since what comes
    first there is the given start token.
    """
    first = predicts.int().argmax(dim=1) + is_encoder_decoder
    return torch.where(predicts.any(dim=1), first, predicts.shape[1])


def track_calls(
    model: nn.Module, stacks: Sequence[nn.Module] = (), shifts_labels: bool = False, whole_input: bool = False
) -> CallTracker:
    """Sets the hooks on ``model`` and on the ``stacks`` inside it, once; returns the model's tracker.

    Args:
        model: the module whose forward is one call.
        stacks: modules inside it that are given an attention mask of their own.
        shifts_labels: whether the model's loss predicts token t+1 at t, so that the first label counts for nothing.
        whole_input: whether the model answers about its whole input, as a classifier does, instead of continuing it.
    """
    existing = find_tracker(model)
    if existing is not None:
        return existing
    checkpointed = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    tracker = CallTracker(shifts_labels, checkpointed, whole_input)
    set_prompted_generate(model)
    for module in (model, *stacks):
        module.register_forward_pre_hook(tracker.open, with_kwargs=True)
        module.register_forward_hook(tracker.close, always_call=True)
    return tracker


def find_tracker(model: nn.Module) -> CallTracker | None:
    """The tracker set on ``model`` or on the first module inside it that has one."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if _is_trackers(hook):
                tracker: CallTracker = hook.__self__  # type: ignore[attr-defined]
                return tracker
    return None


def untrack_calls(model: nn.Module) -> None:
    """Takes away what ``track_calls`` set on a model and what its calls left on the blocks."""
    for module in model.modules():
        unset_prompted_generate(module)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if _is_trackers(hook)]:
                del hooks[key]
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, _CarryFrame):
            module._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment]


def _is_trackers(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), CallTracker)


@contextmanager
def loss_scale(model: nn.Module, scale: float) -> Iterator[None]:
    """States the scale of a loss that is built outside the model, for the backward passes inside the context.

    Args:
        model: a model with a lamella adapter.
        scale: what the task loss is multiplied by before backward: 1 / accumulation steps, times a gradient scaler's.
    """
    tracker = find_tracker(model)
    if tracker is None:
        raise LamellaError(f"{type(model).__name__} has no lamella adapter, so there is no balance loss to scale.")
    before, tracker.scale = tracker.scale, scale
    try:
        yield
    finally:
        tracker.scale = before


class _RecordScale(torch.autograd.Function):
    """The identity on the model's loss; its backward tells the call how the loss is scaled."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, call: RoutedCall) -> Tensor:
        ctx.call = call
        return loss.clone()  # not a view: trainers multiply the loss in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.call.recorded_scale = grad.detach()
        return grad, None


def _record_loss_scale(output: Any, call: RoutedCall) -> Any:
    if isinstance(output, MutableMapping) and _is_loss(output.get("loss")):
        output["loss"] = _RecordScale.apply(output["loss"], call)
    elif isinstance(output, tuple) and output and _is_loss(output[0]):
        return (_RecordScale.apply(output[0], call), *output[1:])
    return output


def _is_loss(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad


def _frame_of_stack(call: RoutedCall, arguments: Mapping[str, Any], parent: Frame | None) -> Frame:
    is_decoder = arguments.get("encoder_hidden_states") is not None
    mask = arguments.get("attention_mask")
    real: Tensor | None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask.bool()
    elif is_decoder:
        real = call.decoder_mask
    elif mask is None:
        real = None
    elif parent is None or parent.call is not call:
        real = _real_by_expanded(mask)
    else:  # already expanded for attention: the stack around this one was given the plain mask
        real = parent.mask
    encoder_mask = arguments.get("encoder_attention_mask")
    encoder_real = encoder_mask.bool() if isinstance(encoder_mask, Tensor) and encoder_mask.dim() == 2 else None
    named = (arguments.get(name) for name in ("input_ids", "inputs_embeds", "pixel_values"))
    given = next((value for value in named if isinstance(value, Tensor)), None)
    if given is None and parent is not None and parent.call is call:
        given = parent.given
    return Frame(call, real, encoder_real, parent, given=given)


def _real_by_expanded(mask: Any) -> Tensor | None:
    """Real tokens by a mask that was expanded for attention, as ``generate`` does for static caches; None unless so.

    A token is real if any token attends to it. A static cache has columns for tokens that are yet to come.
    """
    if isinstance(mask, Mapping):  # one for each kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    attends = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    attended = attends.any(dim=1).any(dim=1)  # (batch, keys)
    if mask.shape[2] == mask.shape[3]:
        return attended
    so_far = int(attended.any(dim=0).nonzero().max()) + 1 if bool(attended.any()) else 0
    return attended[:, :so_far]


@functools.lru_cache(maxsize=256)
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]  # without self


def _named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = _parameter_names(type(module).forward)
    return {**dict(zip(names, args, strict=False)), **kwargs, "__parameters__": names}


class _CarryFrame:
    """A checkpoint function that runs its block in the frame of the forward, also when it is recomputed."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = _FRAME.get()
        if frame is None:
            return self.checkpoint(block, *args, **kwargs)
        runs = 0

        def run(*block_args: Any, **block_kwargs: Any) -> Any:
            nonlocal runs
            around = _FRAME.get()
            _FRAME.set(replace(frame, checkpointed=True, recomputing=runs > 0, handed_over={}))
            runs += 1
            try:
                return block(*block_args, **block_kwargs)
            finally:
                _FRAME.set(around)

        return self.checkpoint(run, *args, **kwargs)


def _carry_frames(modules: Sequence[nn.Module]) -> None:
    """Wraps the checkpoint function of each block, wherever it has been set since the last forward."""
    for module in modules:
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _CarryFrame):
            module._gradient_checkpointing_func = _CarryFrame(checkpoint)  # type: ignore[assignment]
