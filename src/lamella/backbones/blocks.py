"""The block stacks of a transformer, by family and, for an unknown family, by structure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lamella.errors import LamellaError

Role = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class BlockFamily:
    """Where models of one kind keep their blocks.

    Attributes:
        model_types: ``config.model_type`` of the family's members.
        encoder: end of the dotted name of the encoder's list of blocks; None where there is none.
        decoder: the same for the decoder's.
    """

    model_types: tuple[str, ...]
    encoder: str | None = None
    decoder: str | None = None


FAMILIES: tuple[BlockFamily, ...] = (
    BlockFamily(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2", "mpnet", "ernie"),
        encoder="encoder.layer",
    ),
    BlockFamily(("distilbert",), encoder="transformer.layer"),
    BlockFamily(("modernbert",), encoder="layers"),
    BlockFamily(("vit", "deit", "dinov2"), encoder="layer"),
    BlockFamily(("vit", "deit"), encoder="layers"),  # renamed in transformers 5
    BlockFamily(("gpt2", "gpt_neo", "gptj", "gpt_bigcode", "bloom", "falcon"), decoder="h"),
    BlockFamily(("gpt_neox",), decoder="layers"),
    BlockFamily(
        (
            "llama",
            "mistral",
            "mixtral",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "qwen3_moe",
            "gemma",
            "gemma2",
            "gemma3_text",
            "phi",
            "phi3",
            "olmo",
            "olmo2",
            "olmoe",
            "granite",
            "smollm3",
            "stablelm",
            "starcoder2",
            "cohere",
            "deepseek_v2",
            "deepseek_v3",
            "gpt_oss",
            "granitemoe",
            "phimoe",
        ),
        decoder="layers",
    ),
    BlockFamily(("opt",), decoder="decoder.layers"),
    BlockFamily(
        ("t5", "mt5", "umt5", "longt5", "switch_transformers"), encoder="encoder.block", decoder="decoder.block"
    ),
    BlockFamily(("bart", "mbart", "pegasus", "marian", "m2m_100"), encoder="encoder.layers", decoder="decoder.layers"),
)

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
    """One list of blocks: its dotted name, whether an encoder's or a decoder's, how many, and how it was found."""

    name: str
    role: Role
    depth: int
    found_by: str


@dataclass(frozen=True)
class Place:
    """Where a module lies: its stack, the index of its block there, and its name inside the block."""

    stack: str
    layer: int
    module: str

    @property
    def reads_encoder(self) -> bool:
        """Whether its input is the encoder's states: keys and values of cross-attention."""
        *above, leaf = self.module.split(".")
        return leaf in _KEYS_AND_VALUES and any(part in CROSS_ATTENTION for part in above)


def locate_stacks(model: nn.Module) -> list[Stack]:
    """Finds the stacks of blocks of a model, encoder first.

    A known family (``model.config.model_type``) is looked up in ``FAMILIES``; otherwise every outermost list of at
    least two blocks of one class counts as a stack, the one with most parameters and any as deep as half of it.

    Raises:
        LamellaError: nothing that looks like a stack of blocks.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            stacks = _stacks_of_family(lists, family, str(model_type))
            if stacks:
                return stacks
    return _stacks_by_structure(model, lists, model_type)


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


def _stacks_of_family(lists: dict[str, nn.ModuleList], family: BlockFamily, model_type: str) -> list[Stack]:
    stacks: list[Stack] = []
    wanted: list[tuple[Role, str | None]] = [("encoder", family.encoder), ("decoder", family.decoder)]
    for role, ending in wanted:
        if ending is None:
            continue
        matches = [name for name in lists if name == ending or name.endswith(f".{ending}")]
        stacks += [Stack(name, role, len(lists[name]), f"family {model_type}") for name in _outermost(matches)]
    return stacks


def _stacks_by_structure(model: nn.Module, lists: dict[str, nn.ModuleList], model_type: object) -> list[Stack]:
    uniform = [
        name
        for name, blocks in lists.items()
        if len(blocks) > 1 and len({type(block) for block in blocks}) == 1 and _has_linear(blocks[0])
    ]
    candidates = _outermost(uniform)
    if not candidates:
        raise LamellaError(
            f"No stack of blocks was found in {type(model).__name__} (model_type={model_type!r}): there is no "
            "list of at least two alike modules that contain linear layers. lamella needs to know which layer a module "
            "belongs to; add the family to lamella.backbones.blocks.FAMILIES, or apply the adapter to the "
            "transformer inside."
        )
    size = {name: sum(p.numel() for p in lists[name].parameters()) for name in candidates}
    largest = max(size.values())
    found_by = f"structure (model_type={model_type!r} is not a known family)"
    return [
        Stack(name, "decoder" if "decoder" in name else "encoder", len(lists[name]), found_by)
        for name in candidates
        if 2 * size[name] >= largest
    ]


def _outermost(names: Sequence[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _has_linear(module: nn.Module) -> bool:
    weights = (getattr(child, "weight", None) for child in module.modules())
    return any(isinstance(weight, Tensor) and weight.dim() == 2 for weight in weights)


# Attributes, of a block or of what is in it, in which blocks of one class can differ in what they are given or may see.
_ATTENTION = ("layer_type", "attention_type", "is_sliding", "sliding_window", "is_cross_attention")


def kind_of_block(block: nn.Module) -> str:
    """What a block must share with another to run in its place: its class and its kinds of attention, in words.

    Blocks of one kind are given the same kind of mask and position, so that one can run on the other's input.
    """
    kinds = {
        f"{name}={value}"
        for module in block.modules()
        for name in _ATTENTION
        if isinstance(value := module.__dict__.get(name), str | int) and value is not False
    }
    return " ".join([type(block).__name__, *sorted(kinds)])
