"""A few inputs that a model can be run on, for a look at what it does with them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS, ENCODER_TOKENS = 2, 5, 7  # three numbers, so that no axis is taken for another
_SAMPLES = 4000  # of sound: a quarter of a second


def few_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """A few tokens, images or a short sound; None where nobody says what the model is given, or weights are away."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    config, device = getattr(model, "config", None), next((p.device for p in model.parameters()), None)
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        widths = {"input_ids": ENCODER_TOKENS, "decoder_input_ids": TOKENS} if is_encoder_decoder else {name: TOKENS}
        return {key: _ids(model, width).to(device) for key, width in widths.items()}
    if name == "pixel_values":
        side, frames = getattr(config, "image_size", None), getattr(config, "num_frames", None)
        sides = (side, side) if isinstance(side, int) else side
        if isinstance(sides, list | tuple):
            shape = (BATCH, *([frames] if frames else []), getattr(config, "num_channels", 3), *sides)
            return {name: torch.ones(shape, device=device, dtype=getattr(model, "dtype", None))}
    if name == "input_values":
        return {name: torch.linspace(-1, 1, BATCH * _SAMPLES, device=device).view(BATCH, _SAMPLES)}
    return None


def try_out(model: nn.Module, given: dict[str, Tensor], *inside: AbstractContextManager[object]) -> bool:
    """Runs a model in evaluation mode and without gradients, and leaves it as it was.

    Args:
        model: the model.
        given: its inputs.
        inside: what is entered for this forward, such as the handles of hooks.

    Returns:
        Whether it ran: it is another's forward, which may want more and raises whatever it likes.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(), _as_it_was(model), ExitStack() as entered:
            for one in inside:
                entered.enter_context(one)
            model.eval()(**given)
    except Exception:
        return False
    return True


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Undoes what is done to a model's modules inside: their modes, what a forward keeps in them or exchanges.

    BigBird, for one, changes to another attention for good where it is given few tokens.
    """
    held = ("_modules", "_buffers")
    before = {
        module: (dict(vars(module)), {name: dict(vars(module)[name]) for name in held}) for module in model.modules()
    }
    try:
        yield
    finally:
        for module, (attributes, of_module) in before.items():
            vars(module).clear()
            vars(module).update(attributes)
            for name, members in of_module.items():
                vars(module)[name].clear()
                vars(module)[name].update(members)


def _ids(model: nn.Module, width: int) -> Tensor:
    """Different words, so that experts get few each; special tokens lie at the ends of a vocabulary."""
    config: Any = model.config
    middle = getattr(config.get_text_config(), "vocab_size", 0) // 2
    return middle + torch.arange(BATCH * width).view(BATCH, width) % max(middle, 1)
