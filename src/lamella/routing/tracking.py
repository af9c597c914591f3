"""How a model's forwards become calls: hooks on the model and on the stacks inside it.

The outermost tracked module that runs opens a call; each stack inside it opens a frame with its own attention mask, so
that encoder, decoder and cross-attention each see theirs. A gradient-checkpointed block carries its frame along, so
that recomputation in the backward pass sees the same one, also in another thread.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lamella.compiling import between_graphs, known_when_traced
from lamella.errors import LamellaError
from lamella.routing.attachment import join, record_loss_scale
from lamella.routing.balance import CollectedLoss
from lamella.routing.calls import RoutedCall, RouterKey, TrackedModel
from lamella.routing.context import (
    Frame,
    calling_frame,
    current_context,
    current_frame,
    enter,
    in_frame,
    leave,
    stated_collection,
    stated_prompt,
)
from lamella.routing.decision import Decision
from lamella.routing.documents import Packing
from lamella.routing.generating import unwrap_generation, wrap_generation
from lamella.routing.masks import other_masks, real_by_expanded
from lamella.routing.prompt import find_given

_SAID_ELSEWHERE = {
    "thread": "masked_experts or fixed_weights holds in another thread, and so not for this forward, which asks the "
    "routers. A thread that belongs to the `with` statement around its start is started with a copy of its context: "
    "Thread(target=contextvars.copy_context().run, args=(model.generate, ...)).",
    "generator": "masked_experts or fixed_weights stands in a generator that is suspended, and so does not hold for "
    "this forward of whoever iterates it, which asks the routers. If it is to hold for them, make the generator a "
    "context manager (contextlib.contextmanager), or put the `with` statement around the loop.",
}


class CallTracker(TrackedModel):
    """The hooks of one model.

    ``checkpointed`` are the modules that transformers gives a checkpoint function when checkpointing is enabled.
    """

    def __init__(self, shifts_labels: bool, checkpointed: Sequence[nn.Module], whole_input: bool = False) -> None:
        super().__init__(shifts_labels, whole_input)
        self.checkpointed = checkpointed

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model and of each stack in it."""
        if not torch.compiler.is_dynamo_compiling():
            self._open(module, args, kwargs, runs_in=sys._getframe(1))
        elif module.training and any(getattr(one, "gradient_checkpointing", False) for one in self.checkpointed):
            _open_uncompiled(self, module, args, kwargs)
        else:
            self._open(module, args, kwargs, runs_in=None)

    def _open(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], runs_in: FrameType | None
    ) -> None:
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise LamellaError(
                "torch.jit.trace would keep for every input what is decided and added for its example. Run the model "
                "itself, trace a plain LoRA (lamella.collapse), or use torch.export."
            )
        arguments = _named_arguments(module, args, kwargs)
        parent = calling_frame(self, module)
        if parent is None:
            if module.training:
                _carry_frames(self.checkpointed)
            call = self._start_call(module, arguments)
            for listener in self.listeners:
                listener.opened(call, arguments)
            given = _decoder_input(module, arguments)
            call.tokens = 0 if given is None else given.shape[1]
            if call.generation is not None and call.prompt is None and call.past == 0:
                call.prompt = call.generation.prompt_of(given)
        else:
            call = parent.call
        enter(_frame_of_stack(call, module, arguments, parent), module, runs_in)

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook, run also when the forward raised an Exception."""
        frame = leave(module)
        if frame is None:
            return output
        frame.projections.clear()
        frame.decisions.clear()
        call = frame.call
        if frame.parent is not None or output is None:  # inside a call, or of one that has failed
            return output
        _refuse_bypassed(module, call)
        for listener in self.listeners:
            listener.closed(call, output)
        if call.collected is None:
            return record_loss_scale(output, call)
        joint = [(f"log balance of {adapter}", loss.value()) for adapter, loss in call.balances.items()]
        call.collected.by_name.extend(call.losses + joint)
        return join(call, output) if call.joins and call.collected.by_name else output

    def open_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of each block: it may be given other tokens than its stack."""
        frame = current_frame()
        if frame is None or frame.call.tracker is not self:
            return
        wrapped = getattr(block, "base_layer", block)
        names, arguments = _parameter_names(type(wrapped).forward), _named_arguments(wrapped, args, kwargs)
        states = arguments.get(names[0]) if names else None
        if not isinstance(states, Tensor) or states.dim() != 3:
            return
        of_block = frame.of_block(states, arguments, takes_mask="attention_mask" in names)
        if of_block is not frame:
            enter(of_block, block, runs_in=None if torch.compiler.is_dynamo_compiling() else sys._getframe(1))

    def close_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, run also when the forward raised an Exception."""
        leave(block)

    def _start_call(self, module: nn.Module, arguments: Mapping[str, Any]) -> RoutedCall:
        labels = arguments.get("labels")
        is_encoder_decoder = "decoder_input_ids" in _parameter_names(type(module).forward)
        predicts = labels.ne(-100) if isinstance(labels, Tensor) and labels.dim() == 2 else None
        collected, joins = stated_collection(), False
        if collected is None and torch.compiler.is_compiling():
            collected, joins = CollectedLoss(), True
        if (where := self.overrides.elsewhere()) is not None:
            self.say_once(f"overrides in a {where}", _SAID_ELSEWHERE[where])
        return RoutedCall(
            tracker=self,
            label_share=self._label_share(arguments),
            trainers_scale=None if collected is not None else self.trainers_scale(self.shifts_labels),
            decoder_mask=predicts if is_encoder_decoder else None,
            prompt=stated_prompt(),
            generation=current_context().generation,
            overrides=self.overrides_here(),
            given=find_given(arguments, self.shifts_labels, is_encoder_decoder),
            collected=collected,
            joins=joins,
            half=any(
                torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
                for kind in ("cpu", "cuda")
            ),
        )

    def _label_share(self, arguments: Mapping[str, Any]) -> Tensor | float:
        labels, total = arguments.get("labels"), arguments.get("num_items_in_batch")
        if total is None or not isinstance(labels, Tensor):
            return 1.0
        shifted = arguments.get("shift_labels")
        counted = shifted if isinstance(shifted, Tensor) else labels[..., 1:] if self.shifts_labels else labels
        return counted.ne(-100).sum() / total


@between_graphs("blocks that are checkpointed are recomputed outside the graph")
def _open_uncompiled(tracker: CallTracker, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tracker._open(module, args, kwargs, runs_in=None)


def _refuse_bypassed(model: nn.Module, call: RoutedCall) -> None:
    """Raises where something else computed with a layer's weight: what the layer adds is missing there.

    In training that is a warning: some models do so by themselves there and call it in evaluation (Gemma 3n).
    """
    names = {module: name for name, module in model.named_modules()} if call.used or call.read else {}
    for bypassed in dict.fromkeys(call.used + [layer for layer in call.read if layer not in call.called]):
        around, _, name = names[bypassed].rpartition(".")
        is_called = bypassed in call.called
        untrained = "" if is_called or not bypassed.training else " and is not trained"
        said = (
            f"{type(model.get_submodule(around)).__name__} {'calls its' if is_called else 'has not called its'} "
            f"{name}, which has an adapter, {'and also computes with its' if is_called else 'but read its'} weight, as "
            "a fast path or a kernel does that multiplies by it itself: the adapter has no effect there"
            f"{untrained}. Switch that off, or adapt the model without {name} (exclude_modules)."
        )
        if not bypassed.training:
            raise LamellaError(said)
        call.tracker.say_once(f"{name} is not called", said)


def _decoder_input(module: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
    """What the decoder is given in a call, ids or embeddings; None where it is given nothing."""
    is_pair = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    names = ("decoder_inputs_embeds", "decoder_input_ids") if is_pair else ("inputs_embeds", "input_ids")
    return next((value for name in names if isinstance(value := arguments.get(name), Tensor)), None)


def track_calls(
    model: nn.Module,
    stacks: Sequence[nn.Module] = (),
    shifts_labels: bool = False,
    whole_input: bool = False,
    blocks: Sequence[nn.Module] = (),
) -> CallTracker:
    """Sets the hooks on ``model`` and on the ``stacks`` inside it, once; returns the model's tracker.

    Args:
        model: the module whose forward is one call.
        stacks: modules inside it that are given an attention mask of their own.
        shifts_labels: whether the model's loss predicts token t+1 at t, so that the first label counts for nothing.
        whole_input: whether the model answers about its whole input, as a classifier does, instead of continuing it.
        blocks: modules inside the stacks, each of which may be given other tokens than its stack.
    """
    existing = find_tracker(model)
    if existing is not None:
        return existing
    checkpointed = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    tracker = CallTracker(shifts_labels, checkpointed, whole_input)
    wrap_generation(model, tracker)
    for module in (model, *stacks):
        module.register_forward_pre_hook(tracker.open, with_kwargs=True)
        module.register_forward_hook(tracker.close, always_call=True)
    for block in blocks:
        block.register_forward_pre_hook(tracker.open_block, with_kwargs=True)
        block.register_forward_hook(tracker.close_block, always_call=True)
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
        unwrap_generation(module)
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

    For a loop by hand. transformers' Trainer and TRL's trainers need it not, nor does a loss that the model returns,
    nor `accelerate` with ``gradient_accumulation_steps`` and a prepared data loader, fp16 aside.

    Args:
        model: a model with a lamella adapter.
        scale: what the task loss is multiplied by before backward: 1 / accumulation steps, times a gradient scaler's.
    """
    tracker = find_tracker(model)
    if tracker is None:
        raise LamellaError(f"{type(model).__name__} has no lamella adapter, so there is no balance loss to scale.")
    # Of the model, not of this thread: with a device the backward pass runs in another.
    said = object()
    tracker.scales[said] = scale
    try:
        yield
    finally:
        del tracker.scales[said]


def _frame_of_stack(call: RoutedCall, stack: nn.Module, arguments: Mapping[str, Any], parent: Frame | None) -> Frame:
    is_decoder = arguments.get("encoder_hidden_states") is not None
    mask = arguments.get("attention_mask")
    real: Tensor | None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask.bool()
    elif is_decoder:
        real = call.decoder_mask
    elif mask is None:
        real = None
    elif parent is None:
        real = real_by_expanded(mask)
    else:  # already expanded for attention: the stack around this one was given the plain mask
        real = parent.mask
    encoder_mask = arguments.get("encoder_attention_mask")
    encoder_real = encoder_mask.bool() if isinstance(encoder_mask, Tensor) and encoder_mask.dim() == 2 else None
    names = ("input_ids", "inputs_embeds", "pixel_values", getattr(stack, "main_input_name", None))
    named = (arguments.get(name) for name in names if name is not None)
    given = next((value for value in named if isinstance(value, Tensor)), None)
    if given is None and parent is not None:
        given = parent.given
    ids = arguments.get("input_ids")
    width = ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None
    # a mask that the model makes itself, as of the tokens that are an image's, says nothing of padding
    unread = other_masks(arguments) if parent is None else {} if mask is not None else dict(parent.unread)
    packing = Packing(arguments)
    return Frame(
        call, real, encoder_real, parent, stack=stack, given=given, width=width, packing=packing, unread=unread
    )


@known_when_traced
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return _read_parameter_names(forward)


@functools.lru_cache(maxsize=256)
def _read_parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]  # without self


def _named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_parameter_names(type(module).forward), args, strict=False)), **kwargs}


class _CarryFrame:
    """A checkpoint function that runs its block in the frame of the forward, also when it is recomputed."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = current_frame()
        if frame is None:
            return self.checkpoint(block, *args, **kwargs)
        has_graph, runs = torch.is_grad_enabled(), 0
        decided: dict[RouterKey, Decision] = {}  # before it runs, by a block that it is part of

        def run(*block_args: Any, **block_kwargs: Any) -> Any:
            nonlocal runs, decided
            is_first, runs = runs == 0, runs + 1
            # Reentrant checkpointing runs without a graph, and would lose the gradient of what another has decided.
            hands_on = is_first and torch.is_grad_enabled() == has_graph
            if hands_on:
                decided = dict(frame.decisions)
            again = frame.again(checkpointed=True, recomputing=not is_first, decisions=dict(decided))
            with in_frame(again):
                output = block(*block_args, **block_kwargs)
            if hands_on:
                frame.decisions.update(again.decisions)
            return output

        return self.checkpoint(run, *args, **kwargs)


def _carry_frames(modules: Sequence[nn.Module]) -> None:
    """Wraps the checkpoint function of each block, wherever it has been set since the last forward."""
    for module in modules:
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _CarryFrame):
            module._gradient_checkpointing_func = _CarryFrame(checkpoint)  # type: ignore[assignment]
