"""Where things are in a model: its stacks of blocks, the blocks' linear modules, and how a block is called."""

from lamella.backbones.block_calls import BlockCall, hidden_states_of, with_hidden_states
from lamella.backbones.blocks import (
    BlockFamily,
    Place,
    Stack,
    find_place,
    kind_of_block,
    locate_stacks,
    siblings_with_same_input,
)
from lamella.backbones.rehearsal import Rehearsal, rehearse

__all__ = [
    "BlockCall",
    "BlockFamily",
    "Place",
    "Rehearsal",
    "Stack",
    "find_place",
    "hidden_states_of",
    "kind_of_block",
    "locate_stacks",
    "rehearse",
    "siblings_with_same_input",
    "with_hidden_states",
]
