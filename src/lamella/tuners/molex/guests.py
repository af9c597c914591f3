"""Running another block of the stack on this block's input."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers.utils import output_capturing

from lamella.backbones import BlockCall, hidden_states_of
from lamella.errors import LamellaError

# What a block has kept of the sequences in itself, by the module inside it and the attribute.
States = dict[tuple[str, str], Tensor | None]
# Where blocks keep something, as their first runs with a cache have shown: on a prompt, and on a single token.
_KEPT_AT: WeakKeyDictionary[nn.Module, dict[bool, set[tuple[str, str]]]] = WeakKeyDictionary()
# What they had there before they read the sequences that they have read last, as a guest has before it reads any.
_BEGAN_WITH: WeakKeyDictionary[nn.Module, States] = WeakKeyDictionary()


def run_guest(
    block: nn.Module,
    call: BlockCall,
    rows: Tensor | None,
    cache: Any,
    kept: States | None,
    output: Any,
    dtype: str | None,
    recompute: bool,
) -> Tensor:
    """The hidden states another block makes of a call's input.

    Args:
        block: the guest.
        call: the host's call.
        rows: the sequences that it runs on; None for all.
        cache: the guest's keys and values, of the sequences that it runs on; None without.
        kept: what it has kept of them in itself, beside the cache; brought up to date. None without a cache.
        output: what the host returned.
        dtype: "bfloat16" to run under autocast to it.
        recompute: whether to recompute it in the backward pass instead of keeping its activations.

    Returns:
        ``(rows, tokens, features)``, on the host's device and in its precision.
    """
    recompute = recompute and block.training and torch.is_grad_enabled() and not is_checkpointed(block)
    # A recomputed block would write its keys a second time.
    args, kwargs = call.on(rows, None if recompute else cache, output)
    device, is_single = call.hidden_states.device.type, call.hidden_states.shape[1] == 1

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with _kept_apart(block, kept, is_single):
            return hidden_states_of(block(*args, **kwargs))

    states = run_apart(run, args, kwargs, device, dtype, recompute)
    host = hidden_states_of(output)
    return states.to(device=host.device, dtype=host.dtype)


def run_apart(
    run: Callable[..., Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: str,
    dtype: str | None,
    recompute: bool,
) -> Tensor:
    """Runs a guest: hidden from who collects the states of blocks, perhaps under autocast, perhaps recomputed."""

    def cast(*args: Any, **kwargs: Any) -> Tensor:
        with _bfloat16(device) if dtype == "bfloat16" else nullcontext():
            return run(*args, **kwargs)

    with _unseen():
        if recompute:
            states: Tensor = checkpoint(cast, *args, use_reentrant=False, **kwargs)
            return states
        return cast(*args, **kwargs)


def is_checkpointed(block: nn.Module) -> bool:
    """Whether transformers recomputes this block in the backward pass, and keeps no cache for it."""
    return bool(getattr(block, "gradient_checkpointing", False)) and block.training


@contextmanager
def beginning(block: nn.Module, is_single: bool) -> Iterator[None]:
    """Around a block's own first run on sequences: notes what it has in itself before, for when it is a guest."""
    own = _attributes(block, is_single)
    yield
    _BEGAN_WITH[block] = {at: own.get(at) for at in _changed(block, is_single, own)}


@contextmanager
def _kept_apart(block: nn.Module, kept: States | None, is_single: bool) -> Iterator[None]:
    """Gives a block what it has kept as this guest, as RecurrentGemma's do, and afterwards its own back."""
    if kept is None:  # nothing goes on
        yield
        return
    own = _attributes(block, is_single)
    for (module, name), value in (kept or _BEGAN_WITH.get(block, {})).items():
        setattr(block.get_submodule(module), name, value)
    try:
        yield
    finally:
        kept.update(_changed(block, is_single, own))
        for (module, name), value in own.items():
            if getattr(block.get_submodule(module), name, None) is not value:
                setattr(block.get_submodule(module), name, value)


def _changed(block: nn.Module, is_single: bool, before: States) -> States:
    """What a run has left in a block where there was something else before."""
    changed = {at: value for at, value in _attributes(block, is_single).items() if value is not before.get(at)}
    _KEPT_AT.setdefault(block, {}).setdefault(is_single, set()).update(changed)
    return changed


def _attributes(block: nn.Module, is_single: bool) -> States:
    """The tensors, or None, where a block keeps states; wherever it might, as long as such a run has not shown it."""
    known = _KEPT_AT.get(block, {})
    if is_single in known:
        places = set().union(*known.values())
        return {(module, name): getattr(block.get_submodule(module), name, None) for module, name in places}
    return {
        (module, name): value
        for module, inside in block.named_modules()
        for name, value in vars(inside).items()
        if value is None or isinstance(value, Tensor)
    }


@contextmanager
def _bfloat16(device: str) -> Iterator[None]:
    """Autocast to bfloat16, on a CPU with attention in float32."""
    with torch.autocast(device, torch.bfloat16), _WideAttention() if device == "cpu" else nullcontext():
        yield


class _WideAttention(TorchFunctionMode):
    """Attention of bfloat16 tensors in float32: in bfloat16 a CPU takes two to three times as long for its backward."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, _wide, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


@contextmanager
def _unseen() -> Iterator[None]:
    """Hides a guest from ``output_hidden_states`` and ``output_attentions``, which would list it as one more block."""
    before = output_capturing._active_collector.get()
    output_capturing._active_collector.set(None)
    try:
        yield
    finally:
        output_capturing._active_collector.set(before)  # to reset it in compiled code is to forget who collects


def show_mixture(before: Tensor, mixture: Tensor) -> None:
    """Puts the mixture where ``output_hidden_states`` has the host's own output."""
    collected = output_capturing._active_collector.get()
    states = None if collected is None else collected.get("hidden_states")
    if states and states[-1] is before:
        states[-1] = mixture


class _Use(torch.autograd.Function):
    """The identity on its first argument, which keeps the others in the graph with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def keep_in_graph(carrier: Tensor, idle: Sequence[Tensor]) -> Tensor:
    """The carrier, through which tensors that may be idle get a gradient of zero.

    Data-parallel training waits for a gradient of every parameter, also where no sequence of a batch had a guest.
    """
    used: Tensor = _Use.apply(carrier, *idle) if idle else carrier
    return used


def refuse_sharded(wrapper: nn.Module, block: nn.Module) -> None:
    """Raises where blocks are sharded over processes, each of which would have to gather the same guest's weights.

    Raises:
        LamellaError: the block is wrapped by FSDP or split by ZeRO-3.
    """
    classes = {base.__name__ for module in (wrapper, block) for base in type(module).__mro__}
    by_fsdp = "FSDPModule" in classes or getattr(block, "_is_fsdp_managed_module", False)
    by_zero = hasattr(next(block.parameters(), None), "ds_id")
    if by_fsdp or by_zero:
        raise LamellaError(
            f"MoLEx cannot run on blocks sharded by {'FSDP' if by_fsdp else 'DeepSpeed ZeRO-3'}: processes whose "
            "sequences choose different blocks would wait for each other's weights for ever. Use plain data "
            "parallelism (DDP), ZeRO-1 or ZeRO-2, or device_map."
        )
