"""Where things are in a model: its stacks of blocks, the blocks' linear modules, and how a block is called."""

from lamella.backbones.block_calls import BlockCall, hidden_states_of, with_hidden_states
from lamella.backbones.blocks import (
    Place,
    Stack,
    find_blocks,
    find_place,
    find_stacks,
    kinds_of_blocks,
    locate_stacks,
    siblings_with_same_input,
)
from lamella.backbones.causality import sees_later_tokens
from lamella.backbones.rehearsal import Rehearsal, computes, rehearse, views
from lamella.backbones.states import mean_states, why_no_sequences, width_of

__all__ = [
    "BlockCall",
    "Place",
    "Rehearsal",
    "Stack",
    "computes",
    "find_blocks",
    "find_place",
    "find_stacks",
    "hidden_states_of",
    "kinds_of_blocks",
    "locate_stacks",
    "mean_states",
    "rehearse",
    "sees_later_tokens",
    "siblings_with_same_input",
    "views",
    "why_no_sequences",
    "width_of",
    "with_hidden_states",
]
