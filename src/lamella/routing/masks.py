"""Which tokens are real, by the masks that a model, its stacks and their blocks are given."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_HIDES = (
    -1e3
)  # added to a score, in whatever precision: e^-1000 is nothing, and masks have -1e4, -1e9, the least number

# Of what else is called a mask, what says nothing of padding.
_OTHER_MASKS = frozenset({
    "completion_mask", "assistant_masks", "loss_mask", "special_tokens_mask", "global_attention_mask", "head_mask",
    "perm_mask", "bool_masked_pos", "mask_time_indices", "encoder_attention_mask", "decoder_attention_mask",
})  # fmt: skip


def rows_of_mask(mask: Tensor, rows: torch.Size) -> Tensor | None:
    """A mask ``(batch, tokens)`` laid out as a module's rows; None where those are not one for each token.

    A module may be given tokens before sequences, an axis of one, or all tokens of all sequences behind each other.
    """
    if mask.shape[0] == 1 and len(rows) > 1 and mask.shape[1] == rows[-1]:  # one for all sequences
        mask = mask.expand(rows[:-1].numel(), -1)
    axes, shape = ([n for n in size if n != 1] for size in (rows, mask.shape))
    if axes == shape or tuple(rows) == (mask.numel(),):
        return mask
    return mask.t() if axes == shape[::-1] else None


def expanded_mask(mask: Any) -> Tensor | None:
    """A mask that was expanded for attention, one head of it, True where a token attends: ``(batch, queries, keys)``.

    None where a mask is none of these: a tensor ``(batch, heads, queries, keys)``, flex attention's, or one for each
    kind of attention.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if hasattr(mask, "mask_mod"):
        from torch.nn.attention.flex_attention import create_mask  # brings torch's compiler along

        batch, heads, queries, keys = mask.shape
        mask = create_mask(mask.mask_mod, batch, heads, queries, keys, device=mask.kv_indices.device)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    attends = mask > _HIDES if mask.is_floating_point() else mask.bool()
    return attends.any(dim=1)


def real_by_expanded(mask: Any) -> Tensor | None:
    """Real tokens by a mask that was expanded for attention, as ``generate`` does for static caches; None unless so.

    A token is real if any token attends to it. A static cache has columns for tokens that are yet to come.
    """
    attends = expanded_mask(mask)
    if attends is None:
        return None
    attended = attends.any(dim=1)  # (batch, keys)
    if attends.shape[1] == attends.shape[2]:
        return attended
    so_far = int(attended.any(dim=0).nonzero().max()) + 1 if bool(attended.any()) else 0
    return attended[:, :so_far]


def other_masks(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """What may say which tokens are padding, by another name and in another way than ``attention_mask``: XLM's lengths.

    A mask of tokens, or a number of tokens for each sequence; none where there is an attention mask.
    """
    if arguments.get("attention_mask") is not None:
        return {}
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    masks = {name: value for name, value in tensors.items() if "mask" in name and value.dim() == 2}
    lengths = {
        name: value for name, value in tensors.items() if name.endswith(("lengths", "lens")) and value.dim() == 1
    }
    return {name: value for name, value in (masks | lengths).items() if name not in _OTHER_MASKS}


def hides_some(value: Tensor, rows: torch.Size) -> bool:
    """Whether one of `other_masks` is of rows ``(batch, tokens)`` and may hide some of them."""
    if value.dim() == 1:
        return len(value) == rows[0] and not bool((value == rows[1]).all())
    return value.shape in (rows, rows[::-1]) and bool((value != value[:1, :1]).any())


def real_by_block(mask: Any, states: Tensor) -> Tensor | None:
    """Real tokens among the states ``(batch, tokens, features)`` of a block, by its own attention mask.

    Returns:
        ``(batch, tokens)``; None where the mask is of other tokens, or of no known form. No mask hides no token.
    """
    rows = states.shape[:2]
    if mask is None:
        return torch.ones(rows, dtype=torch.bool, device=states.device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = _by_token(mask)
    elif (attends := expanded_mask(mask)) is not None:
        real = attends.any(dim=1)  # (batch or 1, keys)
    else:
        return None
    return real.expand(rows) if real.shape[1] == rows[1] and len(real) in (1, rows[0]) else None


def _by_token(mask: Tensor) -> Tensor:
    """A mask ``(batch, tokens)`` as bools, also one that is added to the scores of attention."""
    is_added = mask.is_floating_point() and not (bool(mask.any()) and bool(((mask == 0) | (mask == 1)).all()))
    return mask >= 0 if is_added else mask.bool()
