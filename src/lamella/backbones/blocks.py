"""The block stacks of a transformer, read from the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lamella.backbones.block_calls import parameter_names
from lamella.backbones.causality import Role, role_of
from lamella.errors import LamellaError

# Names of sibling modules that are given the same input, in the order they run.
SHARED_INPUTS: tuple[tuple[str, ...], ...] = (
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("to_q", "to_k", "to_v"),  # diffusers
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)

# Names of cross-attention modules; their keys and values read the encoder's states, their queries the decoder's.
CROSS_ATTENTION = frozenset({"EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "attn2"})
_KEYS_AND_VALUES = frozenset(
    {"key", "value", "k", "v", "k_proj", "v_proj", "k_lin", "v_lin", "key_proj", "value_proj", "to_k", "to_v"}
)


@dataclass(frozen=True)
class Stack:
    """One list of blocks.

    Attributes:
        name: dotted.
        role: "decoder" where its blocks are causal, or could not be shown not to be.
        depth: how many blocks.
        found_by: what says that these are its blocks: their class is transformers' for "layers", or their "structure".
        evidence: what says which role it is.
    """

    name: str
    role: Role
    depth: int
    found_by: str
    evidence: str = ""

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        return self.role == "decoder"


@dataclass(frozen=True)
class Place:
    """Where a module lies: its stack, the index of its block there, and its name inside the block.

    Outside every stack the stack is "", the layer 0 and the name the module's own.
    """

    stack: str
    layer: int
    module: str

    @property
    def name(self) -> str:
        """The module's dotted name in the model."""
        return f"{self.stack}.{self.layer}.{self.module}" if self.stack else self.module

    @property
    def reads_encoder(self) -> bool:
        """Whether its input is the encoder's states: keys and values of cross-attention."""
        *above, leaf = self.module.split(".")
        return leaf in _KEYS_AND_VALUES and any(part in CROSS_ATTENTION for part in above)


def locate_stacks(model: nn.Module) -> list[Stack]:
    """The stacks of blocks of a model, encoders first.

    Raises:
        LamellaError: it has none.
    """
    stacks = find_stacks(model)
    if not stacks:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        raise LamellaError(
            f"No stack of blocks was found in {type(model).__name__} (model_type={model_type!r}): there is no list of "
            "transformers' layers (GradientCheckpointingLayer), nor one of at least two alike modules that contain "
            "linear layers. Apply the adapter to the transformer inside, or use MoLA, which needs no stack."
        )
    return stacks


def find_stacks(model: nn.Module) -> list[Stack]:
    """The same, and an empty list where there are none.

    A block of transformers is a ``GradientCheckpointingLayer``, so an outermost list of those is a stack, whatever
    their classes. Where a model has no such list, an outermost list of at least two modules of one class that contain
    linear layers is one. Beside the one with most parameters only those at least half as large count, except in an
    encoder-decoder.
    """
    lists, found_by = _lists_of_blocks(model)
    size = {name: sum(p.numel() for block in blocks for p in block.parameters()) for name, blocks in lists.items()}
    candidates = list(lists)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        candidates = [name for name in candidates if 2 * size[name] >= max(size.values())]
    roles = {name: role_of(model, name) for name in candidates}
    stacks = [Stack(name, role, len(lists[name]), found_by, evidence) for name, (role, evidence) in roles.items()]
    return sorted(stacks, key=lambda stack: stack.causal)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Every block of a model, also of stacks too small to count."""
    return [block for blocks in _lists_of_blocks(model)[0].values() for block in blocks]


def _lists_of_blocks(model: nn.Module) -> tuple[dict[str, list[nn.Module]], str]:
    """The outermost lists of blocks by name, and what says that they are: "layers" or "structure"."""
    lists = {name: list(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    of_transformers = [name for name, blocks in lists.items() if blocks and all(map(_is_layer, blocks))]
    names = _outermost(of_transformers or [name for name, blocks in lists.items() if _are_alike(blocks)])
    return {name: lists[name] for name in names}, "layers" if of_transformers else "structure"


def find_place(name: str, stacks: Iterable[Stack]) -> Place | None:
    """The place of the module with this dotted name; None when it lies outside all blocks."""
    for stack in stacks:
        inside = name.removeprefix(f"{stack.name}.") if stack.name else name
        index, _, module = inside.partition(".")
        if inside != name and index.isdigit() and module:
            return Place(stack.name, int(index), module)
    return None


def siblings_with_same_input(place: Place) -> tuple[str, ...]:
    """Names, inside the block, of the modules that are given the same input as this one, itself included."""
    above, _, leaf = place.module.rpartition(".")
    for names in SHARED_INPUTS:
        if leaf in names:
            is_cross = any(part in CROSS_ATTENTION for part in above.split("."))
            same = [name for name in names if not is_cross or (name in _KEYS_AND_VALUES) == (leaf in _KEYS_AND_VALUES)]
            return tuple(f"{above}.{name}" if above else name for name in same)
    return (place.module,)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", module), GradientCheckpointingLayer)


def _are_alike(blocks: Sequence[nn.Module]) -> bool:
    # A list is never called, and a bare linear module is no block.
    blocks = [getattr(block, "base_layer", block) for block in blocks]
    is_block = len(blocks) > 1 and not isinstance(blocks[0], nn.ModuleList) and any(blocks[0].children())
    return is_block and len({type(block) for block in blocks}) == 1 and _has_linear(blocks[0])


def _outermost(names: Sequence[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _has_linear(module: nn.Module) -> bool:
    weights = (getattr(child, "weight", None) for child in module.modules())
    return any(isinstance(weight, Tensor) and weight.dim() == 2 for weight in weights)


# Attributes, of a block or of what is in it, in which blocks of one class can differ in what they are given or may see.
_ATTENTION = ("layer_type", "attention_type", "block_type", "is_sliding", "sliding_window", "is_cross_attention")
_SEES_OTHER_TOKENS = {"attention_mask", "past_key_values", "past_key_value", "layer_past", "cache_params"}


def kinds_of_blocks(model: nn.Module, stack: Stack) -> list[str]:
    """What each block of a stack must share with another to run in its place, in words.

    That is its class, the classes of those parts of it that see other tokens, and what it, its attention and the
    model's ``config.layer_types`` say of the kind of its attention. Blocks of one kind are given the same kinds of
    mask, position and cache, so that one can run on the other's input; their feed-forwards may differ.
    """
    owner = model.get_submodule(stack.name.rpartition(".")[0])
    while not hasattr(owner, "config") and owner is not model:
        owner = model
    said = getattr(getattr(owner, "config", None), "layer_types", None) or []
    blocks = model.get_submodule(stack.name).children()
    return [
        " ".join(
            [type(block).__name__, *sorted(_kinds_in(block) | ({said[at]} if len(said) == stack.depth else set()))]
        )
        for at, block in enumerate(blocks)
    ]


def _kinds_in(block: nn.Module) -> set[str]:
    parts = [module for module in block.modules() if module is not block]
    mixers = {type(part).__name__ for part in parts if _SEES_OTHER_TOKENS & set(parameter_names(type(part).forward))}
    said = {
        f"{name}={value}"
        for module in block.modules()
        for name in _ATTENTION
        if isinstance(value := module.__dict__.get(name), str | int) and value is not False
    }
    return mixers | said
