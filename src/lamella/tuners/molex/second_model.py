"""The blocks of a second pretrained model as guests, behind a trained aligner."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

from lamella.adapters.bases import located, published_name
from lamella.aligners import TwoWayAligner
from lamella.backbones import Stack, find_stacks, hidden_states_of, kinds_of_blocks, sees_later_tokens, width_of
from lamella.backbones.block_calls import parameter_names
from lamella.backbones.loading import load_pretrained
from lamella.errors import LamellaError
from lamella.routing import Frame
from lamella.tuners.molex.cache import GuestSlots
from lamella.tuners.molex.config import MolexConfig
from lamella.tuners.molex.guests import run_apart

_REGISTER_PARAMETER = nn.Module.register_parameter
# Whether a second model runs, in this thread, to show what it gives its first block.
_ASKING: ContextVar[bool] = ContextVar("lamella_asking_second_model", default=False)


class SecondModel(nn.Module):
    """A second model's blocks as functions of the host's hidden states: ``x -> x + U (B(D x + d) - (D x + d))``.

    B is one of its blocks, frozen, and D, d and U an aligner that is trained, one for all of its blocks and all depths:
    a residual stream keeps its basis along the depth. With ``guest_aligner="identity"`` it is ``x -> B(x)``.

    A guest reads what the host has made of the text so far, as MoLEx's own guests do, and no tokens of its own. The
    other way, a forward of the second model beside the host's, of which one would mix in the states of a depth, needs
    its tokens (of another tokenizer, aligned by characters, which no forward is given), runs all of its blocks whatever
    was chosen, and its blocks would never read the host's states. Here a guest costs one block and two products, only
    where it was chosen; it is as causal as the block is, and goes on with a cache at its depth like any guest. What is
    mapped back is the block's own step, so that what a narrower D leaves out of x stays in x.

    The second model is no module of this one: it has no name among the model's parameters, is neither saved nor
    trained, and follows the model to other devices and precisions.

    Source: MoLEx (arXiv 2503.11144) leaves layers of other models to future work; the form is lamella's.
    """

    def __init__(self, name: str, model: PreTrainedModel, stack: Stack, width: int, aligner: str) -> None:
        """Makes guests of a model's blocks.

        Args:
            name: what it is called where guests are named.
            model: without a head.
            stack: its only stack.
            width: H, of the host's states.
            aligner: "linear" or "identity".
        """
        super().__init__()
        self.name = name
        self.stack = stack
        blocks = list(model.get_submodule(stack.name).children())
        kinds = kinds_of_blocks(model, stack)
        self.indices = [index for index, kind in enumerate(kinds) if kind == kinds[0]]
        self.aligner = TwoWayAligner(width, width_of(model, stack.name)) if aligner == "linear" else None
        self._unregistered = [model.requires_grad_(False)]
        self.blocks = [blocks[index] for index in self.indices]
        self.blocks[0].register_forward_pre_hook(_stop, with_kwargs=True)

    def __len__(self) -> int:
        """How many blocks can be guests: those of the kind of its first."""
        return len(self.blocks)

    @property
    def model(self) -> PreTrainedModel:
        """The second model."""
        return self._unregistered[0]

    @property
    def names(self) -> tuple[str, ...]:
        """What its guests are called."""
        return tuple(f"{self.name}.{index}" for index in self.indices)

    def described(self, first: int) -> list[str]:
        """Notes for the summary of an injection, in which its guests have the indices from ``first`` on."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        aligner = "as they are (identity)" if self.aligner is None else "behind linear aligners"
        notes = [
            f"guests {first} to {first + len(self) - 1} are blocks {self.indices[0]} to {self.indices[-1]} of "
            f"{self.name} ({size:,} frozen parameters), {aligner}"
        ]
        if (left := self.stack.depth - len(self)) > 0:
            notes.append(f"{left} blocks of {self.name} are of another kind than its first and cannot be guests")
        return notes

    def train(self, mode: bool = True) -> "SecondModel":
        """Its blocks have their dropout in training, as the host's have."""
        self.model.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SecondModel":
        self.model._apply(fn)
        return super()._apply(fn, recurse)

    def run(
        self,
        guest: int,
        states: Tensor,
        rows: Tensor | None,
        frame: Frame | None,
        cache: Cache | None,
        dtype: str | None,
        recompute: bool,
    ) -> Tensor:
        """What a guest makes of a host's input.

        Args:
            guest: its place among the blocks.
            states: the host's input, ``(batch, tokens, H)``.
            rows: the sequences that it runs on; None for all.
            frame: of the stack; None outside a forward.
            cache: the guest's keys and values, of the sequences that it runs on; None without.
            dtype: "bfloat16" to run under autocast to it.
            recompute: whether to recompute it in the backward pass instead of keeping its activations.

        Returns:
            ``(rows, tokens, H)``, on the host's device and in its precision.

        Raises:
            LamellaError: a row holds several documents, or the second model cannot read so many tokens.
        """
        real = self._real(states, frame, cache)  # (batch, tokens so far)
        if rows is not None:
            states, real = states[rows], real[rows]
        home = next(self.model.parameters())
        recompute = recompute and self.training and torch.is_grad_enabled() and cache is None

        def step(states: Tensor) -> Tensor:
            x = states if self.aligner is None else self.aligner.there(states.to(self.aligner.down.weight.dtype))
            x = x.to(home)  # (rows, tokens, G)
            args, kwargs = self._arguments(x, real.to(home.device), cache)
            y = hidden_states_of(self.blocks[guest](*args, **kwargs))  # (rows, tokens, G)
            if self.aligner is None:
                return y.to(states)
            back = self.aligner.back((y - x).to(self.aligner.up.weight))  # (rows, tokens, H)
            return states + back.to(states)

        return run_apart(step, (states,), {}, home.device.type, dtype, recompute)

    def view(
        self, slots: GuestSlots, depth: int, guest: int, rows: Tensor | None, batch: int, past: int | None
    ) -> Cache:
        """What a guest is given as its cache, as `GuestSlots.view` makes it.

        Raises:
            LamellaError: it or its host keeps something else than the keys and values of all tokens.
        """
        takes = "past_key_values" in parameter_names(type(self.model).forward)
        own = DynamicCache(config=self.model.config).layers if takes else []
        of_host = slots.own.empty[depth]
        plain = takes and all(type(own[index]) is DynamicLayer for index in self.indices)
        if not plain or type(of_host) not in (DynamicLayer, StaticLayer):
            raise LamellaError(
                f"A guest of another model ({self.name}) goes on with a cache only where it and its host both keep the "
                f"keys of all tokens, and here the host has a {type(of_host).__name__}. Pass use_cache=False."
            )
        return slots.view(depth, guest, rows, batch, past, self.stack.depth)

    def _real(self, states: Tensor, frame: Frame | None, cache: Cache | None) -> Tensor:
        """Which tokens so far are real, ``(batch, tokens so far)``."""
        if frame is None:
            return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if frame.sequences(states).packed:
            raise LamellaError(
                f"A row holds several documents, which a guest of another model ({self.name}) would take for one. Give "
                "each document a row of its own."
            )
        past = 0 if cache is None else frame.call.past
        now = frame.real_tokens(states)
        if past == 0:
            return now
        before = now.new_ones(len(now), past) if frame.mask is None else frame.mask[:, :past].to(now.device)
        return torch.cat([before, now], dim=1)

    def _arguments(self, x: Tensor, real: Tensor, cache: Cache | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the second model would give its first block with ``x``: its own kinds of masks and positions.

        It runs as far as that block, which is stopped.
        """
        given = {
            "inputs_embeds": x.detach(),
            "attention_mask": real.long(),
            "position_ids": (real.cumsum(1) - 1).clamp_min(0)[:, -x.shape[1] :],
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        known = parameter_names(type(self.model).forward)
        asking = _ASKING.set(True)
        try:
            with torch.no_grad():
                self.model(**{name: value for name, value in given.items() if name in known})
        except _ReachedError as reached:
            return reached.with_input(parameter_names(type(self.blocks[0]).forward), x)
        except Exception as error:
            raise LamellaError(
                f"The second model {self.name} cannot read {tuple(real.shape)} tokens (sequences, tokens): {error}"
            ) from error
        finally:
            _ASKING.reset(asking)
        raise LamellaError(f"The second model {self.name} does not run {self.stack.name}.0, so it gives no guests.")


class _ReachedError(Exception):
    """A block that was stopped, with what it was given."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.arguments, self.named = args, kwargs

    def with_input(self, names: tuple[str, ...], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same on other states.

        Raises:
            LamellaError: the first block makes something for the others.
        """
        given = {**dict(zip(names, self.arguments, strict=False)), **self.named}
        if "position_bias" in names and given.get("position_bias") is None:
            raise LamellaError(
                "The first block of the second model makes the position bias of all others, so that none of these can "
                "run alone. Give another model as guests_of."
            )
        return ((x, *self.arguments[1:]), self.named) if self.arguments else ((), {**self.named, names[0]: x})


def _stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a second model's first block."""
    if _ASKING.get():
        raise _ReachedError(args, kwargs)


def load_second_model(config: MolexConfig, model: nn.Module, stacks: Sequence[Stack]) -> tuple[SecondModel, str]:
    """The second model of an adapter, and the digest of its weights.

    Args:
        config: the settings, with ``guests_of``.
        model: the model whose blocks are to have guests.
        stacks: its stacks.

    Raises:
        LamellaError: it cannot be loaded, is another than the adapter was trained with, or gives no guests here.
    """
    assert config.guests_of is not None
    name = Path(published_name(config.guests_of)).name
    if len(stacks) != 1:
        raise LamellaError(
            f"guests_of={config.guests_of!r} gives guests to a model of one stack of blocks, and "
            f"{type(model).__name__} has {len(stacks)}: {', '.join(stack.name for stack in stacks)}. Leave it out."
        )
    with _having_numbers():
        path = located(config.guests_of)
        second = _drawn(config) if config.guest_weights == "random" else load_pretrained(path, "auto")
        second = second.base_model
    found = find_stacks(second)
    if len(found) != 1:
        raise LamellaError(f"guests_of={config.guests_of!r} has {len(found)} stacks of blocks; give a model of one.")
    if stacks[0].causal and sees_later_tokens(second.get_submodule(found[0].name), second) is not False:
        raise LamellaError(
            f"Tokens see later ones in the blocks of guests_of={config.guests_of!r}, or could not be shown not to, and "
            f"{stacks[0].name} is causal: a guest would tell a token what follows it. Give a decoder."
        )
    widths = width_of(model, stacks[0].name), width_of(second, found[0].name)
    if config.guest_aligner == "identity" and widths[0] != widths[1]:
        raise LamellaError(
            f"guest_aligner='identity' needs two models of one width, and they have {widths[0]} and {widths[1]} "
            f"(guests_of={config.guests_of!r}). Use guest_aligner='linear'."
        )
    digest = _digest(second)
    if config.guests_sha256 not in (None, digest):
        raise LamellaError(
            f"The adapter was trained with guests of a model whose weights have the sha256 {config.guests_sha256}, and "
            f"those of guests_of={config.guests_of!r} have {digest}. Give the model it was trained with, as guests_of "
            "in its adapter_config.json."
        )
    with _having_numbers():
        guests = SecondModel(name, second, found[0], widths[0], config.guest_aligner)
    with torch.no_grad():  # a block that cannot run alone is refused here
        guests.run(0, torch.zeros(1, 2, widths[0], dtype=second.dtype), None, None, None, None, recompute=False)
    return guests, digest


@contextmanager
def _having_numbers() -> Iterator[None]:
    """Lets a model load inside accelerate's ``init_empty_weights``, in which PEFT injects with low_cpu_mem_usage.

    There each new parameter is left without numbers, to be loaded next; the second model's are in no such file.
    """
    patched = nn.Module.register_parameter
    nn.Module.register_parameter = _REGISTER_PARAMETER  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = patched  # type: ignore[method-assign]


def _drawn(config: MolexConfig) -> PreTrainedModel:
    """The second model with weights as before any training."""
    assert config.guests_of is not None
    try:
        architecture = AutoConfig.from_pretrained(located(config.guests_of), trust_remote_code=False)
    except Exception as error:  # damaged files raise anything
        raise LamellaError(f"guests_of={config.guests_of!r} could not be loaded: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        drawn: PreTrainedModel = AutoModel.from_config(architecture, dtype=torch.float32)
    return drawn.eval()


def _digest(model: PreTrainedModel) -> str:
    """SHA-256 of a model's weights by name, without a pooler, which some files lack and is random then."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "pooler" not in name:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
