"""Which blocks of a stack can stand in each other's place."""

from torch import nn

# Attributes, of a block or of what is in it, in which blocks of one class can differ in what they are given or may see.
_ATTENTION = ("layer_type", "attention_type", "is_sliding", "sliding_window", "is_cross_attention")


def kind_of_block(block: nn.Module) -> str:
    """What a block must share with another to run in its place: its class and its kinds of attention, in words.

    Blocks of one kind are given the same kind of mask and position, so that one can run on the other's input.
    """
    found = {
        f"{name}={value}"
        for module in block.modules()
        for name in _ATTENTION
        if isinstance(value := module.__dict__.get(name), str | int) and value is not False
    }
    return " ".join([type(block).__name__, *sorted(found)])
