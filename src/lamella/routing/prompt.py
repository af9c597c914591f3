"""Which part of a sequence is given: what a decision for the whole sequence may read on a decoder.

A decision that read what the model has yet to say would leak it in training and be another one in generation. So it
reads the prompt alone: inside ``generate`` the ids given; with labels the tokens before the first one that is to be
predicted; by hand whatever ``prompt`` says. Where nothing says, the first few real tokens decide, and they themselves
run without the decision, so that no token's output depends on a later one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lamella.errors import LamellaError


@dataclass(eq=False)
class Prompt:
    """What is known about the prompts of the forwards inside a context.

    Attributes:
        lengths: real tokens of each sequence's prompt, ``(batch,)``; None inside ``generate``.
        width: positions before this one are the prompt, in every row; None until the first forward tells.
        source: inside ``generate`` of an encoder-decoder, what its encoder is given, ``(batch, ...)``.
    """

    lengths: Tensor | None = None
    width: int | None = None
    source: Tensor | None = None

    @property
    def generating(self) -> bool:
        """Whether it is ``generate`` that says so."""
        return self.lengths is None


@dataclass(frozen=True)
class Readable:
    """What a decision for a whole sequence may read, and where it is not applied.

    Attributes:
        read: ``(batch, tokens)``, True where the decision looks.
        without: ``(batch, tokens)``, True where the decision has no effect; None where it has one everywhere.
        complete: whether nothing that comes later would have been read too.
    """

    read: Tensor
    without: Tensor | None
    complete: bool = True


_PROMPT: ContextVar[Prompt | None] = ContextVar("lamella_prompt", default=None)


def current_prompt() -> Prompt | None:
    """What is known about the prompts of a forward that starts now."""
    return _PROMPT.get()


@contextmanager
def prompt(lengths: Sequence[int] | Tensor) -> Iterator[None]:
    """States how long the prompts are, for the forwards inside the context.

    Decisions for whole sequences on a decoder read the prompt alone. ``generate`` and labels tell where it ends; use
    this where neither does, such as in scoring a continuation by its logits.

    Args:
        lengths: real tokens of each sequence's prompt, one per row of the batch; 0 where there is none. With several
            rows per sequence (beams, samples) the rows of a sequence follow each other.

    Raises:
        LamellaError: a length below 0, or no flat list of whole numbers.
    """
    given = torch.as_tensor(lengths)
    if given.dim() != 1 or given.is_floating_point() or given.is_complex() or bool((given < 0).any()):
        raise LamellaError(
            f"lamella.prompt({lengths!r}) needs one whole number of at least 0 per sequence of the batch: the real "
            "tokens of its prompt."
        )
    with _stated(Prompt(lengths=given.long())):
        yield


@contextmanager
def _stated(known: Prompt) -> Iterator[None]:
    token = _PROMPT.set(known)
    try:
        yield
    finally:
        _PROMPT.reset(token)


class PromptedGenerate:
    """A model's ``generate`` that says which ids it was given. Set on the model, so that every caller goes through it.

    What ``lamella.prompt`` says around it stands. Where nobody has said anything about compilation it is off:
    transformers compiles by itself for a static cache on a GPU, and what runs here is decided while it runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = model.__dict__.get("generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's own ``generate``."""
        generate = self.before or type(self.model).generate.__get__(self.model)  # type: ignore[attr-defined]
        if not self._compilation_is_settled(args, kwargs):
            kwargs = {**kwargs, "disable_compile": True}
        with _stated(self._known(args, kwargs)):
            return generate(*args, **kwargs)

    def _known(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
        said = current_prompt()
        named = (kwargs.get("inputs_embeds"), *args[:1], *(kwargs.get(n) for n in ("inputs", "input_ids")))
        given = [tensor for tensor in named if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[1] > 0]
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            # The ids given are the encoder's; what the decoder starts from, its first forward shows.
            given += [tensor for tensor in (kwargs.get("pixel_values"),) if isinstance(tensor, Tensor)]
            return replace(said or Prompt(), source=next(iter(given), None))
        return said or Prompt(width=int(given[0].shape[1]) if given else None)

    def _compilation_is_settled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        own = getattr(self.model, "generation_config", None)
        if own is None:
            return True  # no generate of transformers'
        configs = (own, kwargs.get("generation_config"), *args[1:2])
        names = ("disable_compile", "compile_config")
        return any(kwargs.get(n) is not None or any(getattr(c, n, None) is not None for c in configs) for n in names)


def set_prompted_generate(model: nn.Module) -> None:
    """Lets a model's ``generate``, where it has one, say which ids it was given."""
    if hasattr(type(model), "generate"):
        model.__dict__["generate"] = PromptedGenerate(model)


def unset_prompted_generate(model: nn.Module) -> None:
    """Takes that away again."""
    own = model.__dict__.get("generate")
    if isinstance(own, PromptedGenerate):
        del model.__dict__["generate"]
        if own.before is not None:
            model.__dict__["generate"] = own.before


def find_readable(real: Tensor, known: Prompt | None, label_start: Tensor | None, prompt_tokens: int) -> Readable:
    """What a decision for each whole sequence may read.

    Args:
        real: True for real tokens, ``(batch, tokens)``.
        known: what ``generate`` or ``lamella.prompt`` says.
        label_start: the first position of each sequence that is not given, by its labels, ``(batch,)``.
        prompt_tokens: how many first real tokens decide where nothing is known.

    Raises:
        LamellaError: prompts of another number of sequences than the batch has, or one that comes in parts.
    """
    order = real.cumsum(dim=1)  # (batch, tokens): how many real tokens so far
    given = _given(real, order, known, label_start)
    first = real & (order <= prompt_tokens)
    enough = order[:, -1] >= prompt_tokens  # (batch,)
    if given is None:
        return Readable(first, first, bool(enough.all()))
    has_prompt = given.any(dim=1, keepdim=True)  # (batch, 1)
    if bool(has_prompt.all()):
        return Readable(given, None, _is_whole(order, known))
    complete = _is_whole(order, known) and bool((enough | has_prompt[:, 0]).all())
    return Readable(torch.where(has_prompt, given, first), first & ~has_prompt, complete)


def _is_whole(order: Tensor, known: Prompt | None) -> bool:
    """Whether the prompts that ``lamella.prompt`` speaks of are all there."""
    if known is None or known.lengths is None:
        return True
    lengths = known.lengths.to(order.device)
    return bool((order[:, -1] >= lengths.repeat_interleave(len(order) // len(lengths))).all())


def _given(real: Tensor, order: Tensor, known: Prompt | None, label_start: Tensor | None) -> Tensor | None:
    rows, tokens = real.shape
    if known is not None and known.lengths is not None:
        lengths = known.lengths.to(real.device)
        if len(lengths) == 0 or rows % len(lengths):
            raise LamellaError(
                f"lamella.prompt was given {len(lengths)} lengths, but the batch has {rows} sequences; give one per "
                "sequence."
            )
        return real & (order <= lengths.repeat_interleave(rows // len(lengths))[:, None])
    position = torch.arange(tokens, device=real.device)
    if known is not None:
        if known.width is None:
            known.width = tokens
        if tokens < known.width:
            raise LamellaError(
                f"A decision reads the whole prompt, but generate hands over {tokens} of its {known.width} tokens "
                "first. Generate without prefill_chunk_size, and from an empty cache."
            )
        return real & (position < known.width)
    if label_start is None or len(label_start) != rows:
        return None
    return real & (position < label_start.to(real.device)[:, None])
