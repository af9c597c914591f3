"""Whether the blocks of a stack are causal: whether a token sees only those before it.

A decision for a whole sequence that read on a causal stack what is yet to be said would leak it. So a stack counts as
causal unless something shows that it is not.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

Role = Literal["encoder", "decoder"]

# How transformers' attention, blocks, stacks and configs say that they are causal; the first two also that not.
_SAYS_CAUSAL = ("is_causal", "is_decoder", "causal")

_PROBED_TOKENS = 6


def role_of(model: nn.Module, stack: str) -> tuple[Role, str]:
    """Whether a stack is causal ("decoder") or not ("encoder"), and what says so.

    Args:
        model: the model.
        stack: dotted name of a list of blocks in it.
    """
    blocks = model.get_submodule(stack)
    owners = list(_transformers_around(model, stack))
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
    return "a probe: earlier tokens see later ones" if _sees_later_tokens(blocks, inmost) else None


def _transformers_around(model: nn.Module, stack: str) -> Iterator[PreTrainedModel]:
    """The models of transformers that a stack lies in, the inmost first."""
    parts = stack.split(".")
    for end in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, PreTrainedModel):
            yield module


def _says(blocks: nn.Module, name: str, value: bool) -> bool:
    return any(module.__dict__.get(name) is value for module in blocks.modules())


def _says_owner(owners: list[PreTrainedModel], name: str) -> bool:
    """The inmost model around a stack, or its config; those further out speak of other stacks too."""
    return bool(owners) and any(getattr(said, name, None) is True for said in (owners[0], owners[0].config))


def _lies_in(blocks: nn.Module, around: nn.Module) -> bool:
    return any(module is blocks for module in around.modules())


def _sees_later_tokens(blocks: nn.Module, owner: PreTrainedModel) -> bool:
    """Runs a few tokens twice, the second time with another state of the last one before the first block.

    False also where that cannot be tried: weights that are not there, inputs of another kind.
    """
    first, last = next(iter(blocks.children())), list(blocks.children())[-1]
    if owner.main_input_name != "input_ids" or any(p.is_meta for p in owner.parameters()):
        return False
    ends: list[Tensor] = []

    def disturb(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        states = states.clone()
        states[1, -1] += states[1, -1].flip(-1) + 1
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ends.append(output[0] if isinstance(output, tuple) else output)

    hooks = [first.register_forward_pre_hook(disturb, with_kwargs=True), last.register_forward_hook(keep)]
    modes = {module: module.training for module in owner.modules()}
    owner.eval()
    try:
        with torch.no_grad():
            owner(input_ids=torch.ones(2, _PROBED_TOKENS, dtype=torch.long, device=owner.device))
        (end,) = ends
        before, after = end[:, :-1].float()
        moved = (before - after).abs().max() / before.abs().max()
    except Exception:  # of whatever kind: another model's forward
        return False
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    return bool(moved > 10 * torch.finfo(end.dtype).eps)
