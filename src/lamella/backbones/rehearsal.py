"""In which order the linear modules of a model run, and on which rows: seen in one forward of a few tokens."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lamella.backbones.blocks import Stack, find_place
from lamella.backbones.samples import BATCH, few_inputs, try_out


@dataclass(frozen=True)
class Rehearsal:
    """What a forward showed; empty where none could be run.

    Attributes:
        order: the modules that ran, the first one first.
        other_tokens: patterns of those in blocks whose rows were not one for each token of the block's sequences.
        other_sequences: the same of those whose rows were not some for each of those sequences, one after another.
        turned: of those that ran, whether they were given tokens before sequences.
        other_outputs: of those that ran, the ones that put out something else than a tensor.
        only_read: those that did not run, though something computed with their weights: what is put around them has no
            effect.
        also_read: those that ran, and whose weights something else computed with too.
    """

    order: tuple[str, ...] = ()
    other_tokens: frozenset[str] = field(default_factory=frozenset)
    other_sequences: frozenset[str] = field(default_factory=frozenset)
    turned: Mapping[str, bool] = field(default_factory=dict)
    other_outputs: frozenset[str] = field(default_factory=frozenset)
    only_read: frozenset[str] = field(default_factory=frozenset)
    also_read: frozenset[str] = field(default_factory=frozenset)

    def sort(self, names: Sequence[str]) -> list[str]:
        """The names in the order in which they ran; behind them those that did not run, as they were."""
        ran = {name: at for at, name in enumerate(self.order)}
        return sorted(names, key=lambda name: ran.get(name, len(ran)))

    def is_given_tokens(self, name: str) -> bool:
        """Whether nothing showed that a module, here or in another block, has other rows than its block's tokens."""
        return _pattern(name) not in self.other_tokens

    def is_given_sequences(self, name: str) -> bool:
        """The same for some rows for each sequence."""
        return _pattern(name) not in self.other_sequences


def rehearse(model: nn.Module, stacks: Sequence[Stack], linear: Sequence[str]) -> Rehearsal:
    """Runs a model once, without gradients, on a few tokens, images or a short sound, and watches its linear modules.

    Empty where that cannot be done: weights that are elsewhere, a model of another library, inputs that only a
    processor makes.
    """
    given = few_inputs(model)
    if given is None:
        return Rehearsal()
    rows: dict[str, torch.Size] = {}  # of what a linear module or a block was given first, by its name, in that order
    blocks = [f"{stack.name}.{at}" for stack in stacks for at in range(stack.depth)]
    other: set[str] = set()
    read = _Reads(model, linear)
    hooks = [one for name in (*blocks, *linear) for one in _watch(model.get_submodule(name), name, rows, other)]
    hooks += read.hooks()
    if not try_out(model, given, *hooks, read):
        return Rehearsal()
    order = tuple(name for name in rows if name not in blocks)
    places = {name: place for name in order if (place := find_place(name, stacks)) and not place.reads_encoder}
    of_block = {name: rows.get(f"{place.stack}.{place.layer}", torch.Size()) for name, place in places.items()}
    return Rehearsal(
        order,
        frozenset(_pattern(name) for name, block in of_block.items() if not _is_by_token(rows[name], block)),
        frozenset(_pattern(name) for name, block in of_block.items() if not _is_by_sequence(rows[name], block)),
        {name: rows[name][1:] == (BATCH,) for name in order},
        frozenset(other - {*blocks}),
        frozenset(read.names - rows.keys()),
        frozenset(read.names & rows.keys()),
    )


class _Reads(TorchFunctionMode):
    """Notes with whose weights anything is computed while no module that has them, as tied ones do, runs."""

    def __init__(self, model: nn.Module, linear: Sequence[str]) -> None:
        super().__init__()
        self._names: dict[int, list[str]] = {}
        for name in linear:
            self._names.setdefault(id(model.get_submodule(name).weight), []).append(name)
        leaves = (module for module in model.modules() if not any(module.children()))
        self._having = [module for module in leaves if any(id(one) in self._names for one in module.parameters())]
        self._running: list[nn.Module] = []
        self._views: list[Tensor] = []  # kept, as another tensor could get the id of one that is gone
        self.names: set[str] = set()

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Has the modules say when they run."""
        for module in self._having:
            yield module.register_forward_pre_hook(lambda module, _: self._running.append(module))
            yield module.register_forward_hook(lambda *_: self._running.pop() and None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        own = {id(parameter) for module in self._running for parameter in module.parameters()}
        given = [one for one in tree_leaves((args, kwargs)) if id(one) in self._names and id(one) not in own]
        if given and computes(given, output):
            self.names.update(name for one in given for name in self._names[id(one)])
        for one in given:
            for view in views(one, output):
                self._views.append(view)
                self._names[id(view)] = self._names[id(one)]
        return output


def computes(weights: Sequence[Tensor], output: Any) -> bool:
    """Whether a function of torch made something of weights, and did not only tell of them, show or change them."""
    shown = {id(view) for weight in weights for view in views(weight, output)}
    return any(isinstance(one, Tensor) and id(one) not in shown for one in tree_leaves(output))


def views(weight: Tensor, output: Any) -> list[Tensor]:
    """What of a function's output lies where the weight does: views of it, and itself where it was changed in place."""
    storage = weight.untyped_storage()
    return [one for one in tree_leaves(output) if isinstance(one, Tensor) and one.untyped_storage() is storage]


def _watch(
    module: nn.Module, name: str, rows: dict[str, torch.Size], other: set[str]
) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor):
            rows.setdefault(name, x.shape[:-1])

    def note_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            other.add(name)

    return module.register_forward_pre_hook(note, with_kwargs=True), module.register_forward_hook(note_output)


def _is_by_token(rows: torch.Size, block: torch.Size) -> bool:
    """Whether a module in a block that is given ``(batch, tokens)`` rows is given the same."""
    return block[:1] == (BATCH,) and rows in (block, _flat(block))


def _is_by_sequence(rows: torch.Size, block: torch.Size) -> bool:
    return _is_by_token(rows, block) or (len(rows) > 1 and rows[:1] == block[:1] == (BATCH,))


def _flat(rows: torch.Size) -> torch.Size:
    return torch.Size([rows.numel()])


def _pattern(name: str) -> str:
    """A dotted name without its numbers: alike modules of all blocks and experts have one."""
    return re.sub(r"(?<=[._])\d+(?=\.)", "#", name)
