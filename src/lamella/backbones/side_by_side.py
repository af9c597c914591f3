"""Several forwards of a model whose weights are kept elsewhere, side by side: each weight is read once for all of them.

Each forward runs in a thread of its own, one at a time, and before every block it waits until the others have come as
far. So what runs is the model's own forward, whatever its blocks are given; what lies between blocks waits in memory.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import has_offloaded_params
from torch import nn

from lamella.backbones.blocks import find_blocks
from lamella.backbones.offloading import is_offloaded, onloaded

_HERE = threading.local()  # .forward: the one that this thread runs


def has_offloaded_blocks(model: nn.Module) -> bool:
    """Whether weights of any block are kept elsewhere."""
    return any(is_offloaded(module) for block in find_blocks(model) for module in block.modules())


def run_side_by_side(
    model: nn.Module,
    forwards: Sequence[Callable[[], None]],
    told: Callable[[int], None] | None = None,
) -> None:
    """Runs forwards of a model, all of them through one block before any enters the next.

    A block's weights are brought in when the first forward enters it and stay until the last has left it. What lies
    outside the blocks (embeddings, head) is read once before the first block and once with the last of each stack.

    Args:
        model: with offloaded blocks.
        forwards: each calls the model once. They run in other threads, with this one's context and gradient mode.
        told: how many blocks all of them have left behind, after each.

    Raises:
        Exception: the first that a forward raises; the others are ended where they wait.
    """
    blocks = find_blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    last = {id(blocks[-1]) for blocks in lists}
    running = [_Forward(one) for one in forwards]
    handles = [block.register_forward_pre_hook(_wait) for block in blocks]
    try:
        with kept(outside):
            for one in running:
                one.go_on()
        done = 0
        while waiting := [one for one in running if one.block is not None]:
            block = waiting[0].block
            assert block is not None
            with kept([*block.modules(), *(outside if id(block) in last else ())]):
                for one in waiting:
                    if one.block is block:
                        one.go_on()
            done += 1
            if told is not None:
                told(done)
    finally:
        for handle in handles:
            handle.remove()
        for one in running:
            one.end()


@contextmanager
def kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the context, offloaded weights of these modules are in memory, and calling the modules reads none anew."""
    hooks = {module: module.__dict__["_hf_hook"] for module in modules if has_offloaded_params(module)}
    with onloaded(*hooks):
        try:
            for module, hook in hooks.items():
                module._hf_hook = AlignDevicesHook(
                    hook.execution_device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys
                )
            yield
        finally:
            for module, hook in hooks.items():
                module._hf_hook = hook


def _wait(block: nn.Module, args: Any) -> None:
    """Forward pre-hook of each block."""
    forward: _Forward | None = getattr(_HERE, "forward", None)
    if forward is not None:
        forward.wait(block)


class _EndedError(Exception):
    """Raised in a forward that waits and is to go no further."""


class _Forward:
    """One forward, which runs only while somebody waits in ``go_on``.

    Attributes:
        block: before which it waits; None where it has not begun, or has come to its end.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self.block: nn.Module | None = None
        self._run = run
        self._error: BaseException | None = None
        self._is_ended = False
        self._may_run, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._gradients = torch.is_grad_enabled()  # which a new thread has switched on
        self._thread = threading.Thread(target=copy_context().run, args=(self._body,), daemon=True)

    def go_on(self) -> None:
        """Lets it run to the next block, or to its end; raises what it raised."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._may_run.release()
        self._has_stopped.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, block: nn.Module) -> None:
        """Called by the forward itself."""
        self.block = block
        self._has_stopped.release()
        self._may_run.acquire()
        if self._is_ended:
            raise _EndedError

    def end(self) -> None:
        """Ends it where it waits."""
        if self._thread.is_alive():
            self._is_ended = True
            self._may_run.release()
            self._thread.join()

    def _body(self) -> None:
        _HERE.forward = self
        try:
            with torch.set_grad_enabled(self._gradients):
                self._run()
        except _EndedError:
            pass
        except BaseException as error:  # of the other thread, which raises it
            self._error = error
        finally:
            self.block = None
            self._has_stopped.release()
