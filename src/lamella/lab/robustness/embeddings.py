"""A model's input embeddings: where they are, how large they are, and changing them on their way in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lamella.errors import LamellaError


def input_embeddings(model: nn.Module) -> nn.Module:
    """The module that turns the ids of the input text into vectors; of an encoder-decoder model, the encoder's.

    Raises:
        LamellaError: the model has none.
    """
    reader: Any = model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        reader = reader.get_encoder()  # a module of its own, even where its weight is shared with the decoder's
    try:
        found = reader.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module):
        raise LamellaError(
            f"{type(model).__name__} says nothing of its input embeddings (get_input_embeddings), so no noise can be "
            "put on them. Use a transformers model of text, with or without a PEFT adapter."
        )
    return found


@contextmanager
def changed_embeddings(model: nn.Module, shape: tuple[int, int], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """For one forward inside the context, the input embeddings are what ``change`` makes of them.

    It is a hook on the embedding module and not `inputs_embeds`: models that number their positions by the ids
    (RoBERTa, MPNet) or pool the last real token by them (decoders that classify) still see the ids. Prompt tuning looks
    the text up in the same module and puts its virtual tokens in front of the result, so those stay as they are.

    Args:
        model: a transformers model, with or without a PEFT adapter.
        shape: (N, T) of the ids that the model reads; the first lookup of that shape is changed, later ones are not.
        change: from embeddings (N, T, H) to the same shape and dtype.

    Raises:
        LamellaError: the forward ended without such a lookup.
    """
    done = False

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal done
        if done or output.shape[:-1] != shape:
            return None
        done = True
        return change(output)

    handle = input_embeddings(model).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not done:
        raise LamellaError(
            f"{type(model).__name__} did not look up input ids of shape {tuple(shape)} in the module that "
            "get_input_embeddings names, so the noise never reached it. Give the model input_ids, not inputs_embeds."
        )


def embedding_rms(embeddings: Tensor) -> Tensor:
    """Root mean square over the entries of one sequence's touched tokens (n, H), a scalar in float32; 0 without any."""
    return embeddings.detach().float().square().mean().sqrt() if embeddings.numel() else torch.zeros(())
