"""Whether the blocks of a stack are causal: whether a token sees only those before it.

A decision for a whole sequence that read on a causal stack what is yet to be said would leak it. So a stack counts as
causal unless something shows that it is not.
"""

from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lamella.backbones.states import look, models_around

Role = Literal["encoder", "decoder"]

# How transformers' attention, blocks, stacks and configs say that they are causal; the first two also that not.
_SAYS_CAUSAL = ("is_causal", "is_decoder", "causal")


def role_of(model: nn.Module, stack: str) -> tuple[Role, str]:
    """Whether a stack is causal ("decoder") or not ("encoder"), and what says so.

    Args:
        model: the model.
        stack: dotted name of a list of blocks in it.
    """
    blocks = model.get_submodule(stack)
    owners = list(models_around(model, stack))
    said = next((name for name in _SAYS_CAUSAL if _says(blocks, name, True) or _says_owner(owners, name)), None)
    if said is not None:
        return "decoder", f"{said} is True"
    generator = next((owner for owner in owners if owner.can_generate()), None)
    if generator is not None and _lies_in(blocks, generator.get_decoder()):
        return "decoder", f"{type(generator).__name__} generates with it"
    shown = _shown_not_causal(blocks, owners)
    return ("encoder", shown) if shown is not None else ("decoder", "nothing shows that it is not causal")


def _shown_not_causal(blocks: nn.Module, owners: list[PreTrainedModel]) -> str | None:
    if _says(blocks, "is_decoder", False):
        return "is_decoder is False"
    if not owners:
        return None
    if any(owner.config.is_encoder_decoder and _lies_in(blocks, owner.get_encoder()) for owner in owners):
        return "it is an encoder-decoder's encoder"
    inmost = owners[0]
    read = inmost.input_modalities
    if "text" not in read:
        return f"it reads {read if isinstance(read, str) else ' and '.join(read)}"
    if inmost.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return f"{inmost.config.model_type} fills in masked tokens"
    return "a probe: earlier tokens see later ones" if sees_later_tokens(blocks, inmost) else None


def _says(blocks: nn.Module, name: str, value: bool) -> bool:
    return any(module.__dict__.get(name) is value for module in blocks.modules())


def _says_owner(owners: list[PreTrainedModel], name: str) -> bool:
    """The inmost model around a stack, or its config; those further out speak of other stacks too."""
    return bool(owners) and any(getattr(said, name, None) is True for said in (owners[0], owners[0].config))


def _lies_in(blocks: nn.Module, around: nn.Module) -> bool:
    return any(module is blocks for module in around.modules())


def sees_later_tokens(blocks: nn.Module, owner: PreTrainedModel) -> bool | None:
    """Whether another state of the last token before the first block changes what comes out for earlier ones.

    None where that cannot be tried.
    """
    seen = look(list(blocks.children()), owner)
    if seen is None or seen.end.dim() != 3 or len(seen.end) != 2 or seen.end.shape[1] < 2:
        return None
    before, after = seen.end[:, :-1].float()
    moved = (before - after).abs().max() / before.abs().max()
    return bool(moved > 10 * torch.finfo(seen.end.dtype).eps)
