"""Fitting the aligner of a second model's guests before training, on words that both models read."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer

from lamella.adapters.bases import located
from lamella.aligners import Pairs
from lamella.backbones import BlockCall
from lamella.backbones.modes import evaluating
from lamella.errors import LamellaError
from lamella.tuners.molex.block import MolexBlock

_LONGEST = 128  # tokens of a text that are read
_HELD_OUT = 4  # every fourth text is not fitted on


@torch.no_grad()
def align_guests(model: PeftModel, texts: Iterable[str], tokenizer: Any) -> float:
    """Fits the aligner of the active adapter's second model by ridge regression between what both models make of texts.

    Each model reads the texts by its own tokenizer, and tokens of the two belong together where they end at the same
    character. Pairs are the states before the blocks of both models at the same relative depth. An aligner that was not
    fitted starts without any knowledge of the second model's space, and then its blocks are hardly more than random
    ones at the learning rates of a LoRA.

    Args:
        model: with a MoLEx adapter that has ``guests_of``, before training.
        texts: a few hundred; every fourth is held out.
        tokenizer: the model's own.

    Returns:
        The part of the variance of the second model's states that the aligner leaves unexplained on the held-out
        texts, between 0 and about 1.

    Raises:
        LamellaError: no second model, none behind a linear aligner, tokenizers that do not say where a token stands in
            a text, or too few texts.
    """
    hosts = [module for module in model.modules() if isinstance(module, MolexBlock)]
    second = next((one for host in hosts if (one := host.second_model(model.active_adapter)) is not None), None)
    if second is None or second.aligner is None:
        raise LamellaError("align_guests fits a linear aligner: put a MoLEx with guests_of on the model first.")
    other = AutoTokenizer.from_pretrained(located(model.peft_config[model.active_adapter].guests_of))
    for one in (tokenizer, other):
        if not getattr(one, "is_fast", False):
            raise LamellaError(f"{type(one).__name__} does not say where tokens stand in a text; use a fast tokenizer.")
    here, there = second.aligner.down.in_features, second.aligner.down.out_features
    fitted, held_out = Pairs(here, there), Pairs(here, there)
    own = [host.base_layer for host in hosts]
    with evaluating(model), evaluating(second.model), model.disable_adapter():
        for at, text in enumerate(texts):
            pairs = held_out if at % _HELD_OUT == _HELD_OUT - 1 else fitted
            ours, ends = _states(model, own, tokenizer, text)
            theirs, other_ends = _states(second.model, second.blocks, other, text)
            common = sorted(ends.keys() & other_ends.keys())
            mine, its = [ends[end] for end in common], [other_ends[end] for end in common]
            for depth, states in enumerate(ours):
                pairs.add(states[mine], theirs[_same_depth(depth, len(ours), len(theirs))][its].to(states.device))
    if min(fitted.count, held_out.count) < 2:
        raise LamellaError("The texts have too few words in common to fit an aligner; give a few hundred texts.")
    second.aligner.fit(fitted)
    return second.aligner.unexplained(held_out)


def _states(
    model: nn.Module, blocks: Sequence[nn.Module], tokenizer: Any, text: str
) -> tuple[list[Tensor], dict[int, int]]:
    """What is before each block, ``(tokens, features)``, and which token ends at a character."""
    read = tokenizer(text, return_offsets_mapping=True, return_tensors="pt", truncation=True, max_length=_LONGEST)
    ends = {int(end): at for at, (begin, end) in enumerate(read.pop("offset_mapping")[0].tolist()) if end > begin}
    states: list[Tensor] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(BlockCall(block, args, kwargs).hidden_states[0])

    with ExitStack() as noting:
        for block in blocks:
            noting.enter_context(block.register_forward_pre_hook(note, with_kwargs=True))
        model(**read.to(next(blocks[0].parameters()).device))
    return states, ends


def _same_depth(depth: int, blocks: int, others: int) -> int:
    """The block of another stack that lies as far along it."""
    return round(depth * (others - 1) / max(blocks - 1, 1))
