"""In which order the linear modules of a model run, and on which rows: seen in one forward of a few tokens."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lamella.backbones.blocks import Stack, find_place

_BATCH, _TOKENS, _ENCODER_TOKENS = 2, 5, 7  # three numbers, so that no axis is taken for another
_SAMPLES = 4000  # of sound: a quarter of a second


@dataclass(frozen=True)
class Rehearsal:
    """What a forward showed; empty where none could be run.

    Attributes:
        order: the modules that ran, the first one first.
        other_tokens: patterns of those in blocks whose rows were not one for each token of the block's sequences.
        other_sequences: the same of those whose rows were not some for each of those sequences, one after another.
    """

    order: tuple[str, ...] = ()
    other_tokens: frozenset[str] = field(default_factory=frozenset)
    other_sequences: frozenset[str] = field(default_factory=frozenset)

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
    given = _inputs(model)
    if given is None or any(parameter.is_meta for parameter in model.parameters()):
        return Rehearsal()
    rows: dict[str, torch.Size] = {}  # of what a linear module or a block was given first, by its name, in that order
    blocks = [f"{stack.name}.{at}" for stack in stacks for at in range(stack.depth)]
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as hooks:
        for name in (*blocks, *linear):
            hooks.callback(_watch(model.get_submodule(name), name, rows).remove)
        try:
            with torch.no_grad(), torch.random.fork_rng():
                model.eval()(**given)
        except Exception:  # of whatever kind: it is another's forward
            return Rehearsal()
        finally:
            for module, training in modes.items():
                module.training = training
    order = tuple(name for name in rows if name not in blocks)
    places = {name: place for name in order if (place := find_place(name, stacks)) and not place.reads_encoder}
    of_block = {name: rows.get(f"{place.stack}.{place.layer}", torch.Size()) for name, place in places.items()}
    return Rehearsal(
        order,
        frozenset(_pattern(name) for name, block in of_block.items() if not _is_by_token(rows[name], block)),
        frozenset(_pattern(name) for name, block in of_block.items() if not _is_by_sequence(rows[name], block)),
    )


def _inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """A few tokens, images or a short sound; None where it is not known what the model is given."""
    config, device = getattr(model, "config", None), next((p.device for p in model.parameters()), None)
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        widths = {"input_ids": _ENCODER_TOKENS, "decoder_input_ids": _TOKENS} if is_encoder_decoder else {name: _TOKENS}
        return {key: _ids(model, width).to(device) for key, width in widths.items()}
    if name == "pixel_values":
        side, frames = getattr(config, "image_size", None), getattr(config, "num_frames", None)
        sides = (side, side) if isinstance(side, int) else side
        if isinstance(sides, list | tuple):
            shape = (_BATCH, *([frames] if frames else []), getattr(config, "num_channels", 3), *sides)
            return {name: torch.ones(shape, device=device, dtype=getattr(model, "dtype", None))}
    if name == "input_values":
        return {name: torch.linspace(-1, 1, _BATCH * _SAMPLES, device=device).view(_BATCH, _SAMPLES)}
    return None


def _watch(module: nn.Module, name: str, rows: dict[str, torch.Size]) -> torch.utils.hooks.RemovableHandle:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor):
            rows.setdefault(name, x.shape[:-1])

    return module.register_forward_pre_hook(note, with_kwargs=True)


def _ids(model: nn.Module, width: int) -> Tensor:
    """Different words, so that experts get few each; special tokens lie at the ends of a vocabulary."""
    config: Any = model.config
    middle = getattr(config.get_text_config(), "vocab_size", 0) // 2
    return middle + torch.arange(_BATCH * width).view(_BATCH, width) % max(middle, 1)


def _is_by_token(rows: torch.Size, block: torch.Size) -> bool:
    """Whether a module in a block that is given ``(batch, tokens)`` rows is given the same."""
    return block[:1] == (_BATCH,) and rows in (block, _flat(block))


def _is_by_sequence(rows: torch.Size, block: torch.Size) -> bool:
    return _is_by_token(rows, block) or (len(rows) > 1 and rows[:1] == block[:1] == (_BATCH,))


def _flat(rows: torch.Size) -> torch.Size:
    return torch.Size([rows.numel()])


def _pattern(name: str) -> str:
    """A dotted name without its numbers: alike modules of all blocks and experts have one."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
