"""Where things are in a model: its stacks of blocks and the blocks' linear modules."""

from lamella.backbones.blocks import BlockFamily, Place, Stack, find_place, locate_stacks, siblings_with_same_input

__all__ = ["BlockFamily", "Place", "Stack", "find_place", "locate_stacks", "siblings_with_same_input"]
