"""Modules whose weight is read by the module that they lie in, which does not call them: no adapter acts there."""

import ast
import functools
import inspect
import textwrap
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lamella.errors import LamellaError

# What is done with a module that an adapter has no effect on.
ONLY_READ = "reads its weight without calling it, so that an adapter there has no effect"
_OF_A_MODULE = frozenset({"weight", "bias", "in_features", "out_features", "training"})


class _Reads(NamedTuple):
    """Names of modules, inside a module of some class, whose weight it reads: never calling them, or at times."""

    never_called: frozenset[str]
    at_times: frozenset[str]


def why_never_called(model: nn.Module) -> dict[str, str]:
    """By name the modules that are not called, such as ``out_proj`` in torch's attention, and what is done instead.

    What a class does is read from its source.
    """
    return {
        f"{name}.{part}" if name else part: f"{type(module).__name__} {ONLY_READ}"
        for name, module in model.named_modules()
        for part in _reads_in(module).never_called
    }


def watch_bypassing(model: nn.Module) -> None:
    """Refuses forwards in which a module with an adapter is not called, where its weight may be read instead.

    So it is in fast paths and kernels. ``nn.TransformerEncoderLayer`` leaves its own where a hook is attached to it.
    """
    for module in model.modules():
        for part in _reads_in(module).at_times:
            try:
                layer = module.get_submodule(part)
            except AttributeError:
                continue
            hooks = module._forward_hooks.values()
            if isinstance(layer, BaseTunerLayer) and not any(_watches(hook, layer) for hook in hooks):
                watch = _Watch(layer, part)
                layer.register_forward_pre_hook(watch.see)
                module.register_forward_hook(watch.check)
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, BaseTunerLayer) for m in module.modules()):
            module.use_nested_tensor = False  # a nested tensor can go through the fast path alone


class _Watch:
    """Whether one module is called in the forward of the module that it lies in."""

    def __init__(self, layer: BaseTunerLayer, name: str) -> None:
        self.layer, self.name = layer, name
        self.called: set[int] = set()  # the threads that have called it in a forward that goes on

    def see(self, *_: Any) -> None:
        self.called.add(threading.get_ident())

    def check(self, module: nn.Module, *_: Any) -> None:
        thread = threading.get_ident()
        acts = not self.layer.disable_adapters and set(self.layer.active_adapters) & {
            *self.layer._all_available_adapter_names()
        }
        if acts and thread not in self.called:
            raise LamellaError(
                f"{type(module).__name__} has not called its {self.name}, which has an adapter, but multiplied by its "
                "weight itself, as a fast path or a kernel does: the adapter has no effect there. Switch that off, or "
                f"adapt the model without {self.name} (exclude_modules)."
            )
        self.called.discard(thread)


def _watches(hook: Any, layer: nn.Module) -> bool:
    return isinstance(owner := getattr(hook, "__self__", None), _Watch) and owner.layer is layer


def _reads_in(module: nn.Module) -> _Reads:
    kind: Any = type(module)
    return _reads_of(kind)


@functools.cache
def _reads_of(kind: Any) -> _Reads:
    """What the methods of a class, and of those it is made from, do with the modules inside."""
    sources = {
        name: source
        for one in reversed(kind.__mro__)
        if one is not nn.Module and issubclass(one, nn.Module)
        for name, method in vars(one).items()
        if inspect.isfunction(method) and not name.strip("_").startswith(("init", "reset"))
        and (source := _source(method))
    }  # fmt: skip
    read: set[str] = set()
    used: set[str] = set()
    if any(".weight" in source for name, source in sources.items() if "forward" in name):
        for name, source in sources.items():
            for part, is_weight in _mentioned(ast.parse(source), "forward" in name):
                (read if is_weight else used).add(part)
    never = {part for part in read - used if "." not in part}
    return _Reads(frozenset(never), frozenset(read - never))


def _source(method: Any) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(method))
        ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return ""  # without source, such as a class from a notebook that is gone
    return source


def _mentioned(method: ast.AST, computes: bool) -> Iterator[tuple[str, bool]]:
    """Names of what is used as ``self.name``, and whether it is as ``self.name.weight``, in a forward."""
    # ``self.wo.weight.dtype`` and ``isinstance(self.wo.weight, Tensor)`` ask about the weight, and do not use it.
    inner = {id(node.value): node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)}
    asked = {
        id(argument)
        for node in ast.walk(method)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr")
        for argument in node.args
    }
    for node in ast.walk(method):
        if not isinstance(node, ast.Attribute):
            continue
        first, _, name = ast.unparse(node).partition(".")
        if first != "self" or not name.replace(".", "").isidentifier():
            continue
        if inner.get(id(node)) not in _OF_A_MODULE and node.attr not in _OF_A_MODULE:
            yield name, False
        if node.attr == "weight" and "." in name and computes and not (id(node) in inner or id(node) in asked):
            yield name.removesuffix(".weight"), True
