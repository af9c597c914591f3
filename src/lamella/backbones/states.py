"""What flows between the blocks of a stack: how wide it is, how it is laid out, and a look at it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lamella.backbones.block_calls import BlockCall, hidden_states_of, parameter_names, states_without_sequences
from lamella.backbones.samples import few_inputs, try_out
from lamella.errors import LamellaError
from lamella.progress import counted


def models_around(model: nn.Module, stack: str) -> Iterator[PreTrainedModel]:
    """The models of transformers that a stack of this name lies in, the inmost first."""
    parts = stack.split(".")
    for end in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, PreTrainedModel):
            yield module


def width_of(model: nn.Module, stack: str) -> int:
    """Features of the states between the blocks of a stack.

    That is ``config.hidden_size`` of the model around it, where every block has a norm of that width, otherwise the
    one width that all norms of all blocks have.

    Raises:
        LamellaError: neither.
    """
    configs = [inner.config.get_text_config() for inner in models_around(model, stack)]
    configs = configs or [getattr(model, "config", None)]
    said = next((width for config in configs if isinstance(width := getattr(config, "hidden_size", None), int)), None)
    norms = [_widths_of_norms(block) for block in model.get_submodule(stack).children()]
    if said is not None and all(said in widths or not widths for widths in norms):
        return said
    if len(everywhere := set().union(*norms)) == 1:
        return int(everywhere.pop())
    raise LamellaError(
        f"Nothing says how wide the states between the blocks of {stack} are: config.hidden_size is {said}, and its "
        f"blocks have norms of widths {', '.join(str(sorted(widths)) for widths in norms[:4])}. A block can run in "
        "another's place only where all have the same width."
    )


def _widths_of_norms(block: nn.Module) -> set[int]:
    weights = (getattr(module, "weight", None) for module in block.modules())
    return {len(weight) for weight in weights if isinstance(weight, Tensor) and weight.dim() == 1}


def why_no_sequences(model: nn.Module, stack: str) -> str | None:
    """Why no block of a stack can be chosen for a sequence, by how its states are laid out; None if nothing says so."""
    blocks = list(model.get_submodule(stack).children())
    if "cu_seqlens" in parameter_names(type(blocks[0]).forward):
        return f"the blocks of {stack} are given all images in one row (cu_seqlens), so that there are no sequences"
    seen = next((seen for around in models_around(model, stack) if (seen := look(blocks, around)) is not None), None)
    if seen is None:
        return None
    is_by_sequence = seen.begin.dim() == 3 and len(seen.begin) == 2 and seen.begin.shape == seen.end.shape
    return None if is_by_sequence else states_without_sequences(f"{stack}.0", seen.begin.shape)


class Seen(NamedTuple):
    """What a look at a stack has shown.

    Attributes:
        begin: what its first block was given.
        end: what its last block returned.
    """

    begin: Tensor
    end: Tensor


def look(blocks: list[nn.Module], model: PreTrainedModel) -> Seen | None:
    """What flows through the blocks of a stack where a model reads the same few tokens in two rows.

    In the second row the last token's state before the first block is another than in the first.

    Returns:
        None where that cannot be tried: weights that are not there, inputs of another kind, a model that wants more.
    """
    sample = few_inputs(model)
    if sample is None:
        return None
    known = parameter_names(type(model).forward)
    given = {name: value[:1].repeat(2, *[1] * (value.dim() - 1)) for name, value in sample.items() if name in known}
    seen = _look_at(blocks, model, given)
    if seen is not None and seen.begin.shape[1] < 2:  # of so few tokens a model that pools them leaves only one
        longer = {name: value.repeat(1, 8) if value.dim() == 2 else value for name, value in given.items()}
        return _look_at(blocks, model, longer)
    return seen


def _look_at(blocks: list[nn.Module], model: PreTrainedModel, given: dict[str, Tensor]) -> Seen | None:
    begins: list[Tensor] = []
    ends: list[Tensor] = []

    def disturb(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = parameter_names(type(module).forward)[0]
        states = (args[0] if args else kwargs[name]).clone()
        states[1, -1] += states[1, -1].flip(-1) + 1
        begins.append(states)
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, name: states})

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ends.append(hidden_states_of(output))

    hooks = blocks[0].register_forward_pre_hook(disturb, with_kwargs=True), blocks[-1].register_forward_hook(note)
    ran = try_out(model, given, *hooks)
    return Seen(begins[0], ends[0]) if ran and len(begins) == len(ends) == 1 else None


@torch.no_grad()
def mean_states(model: nn.Module, stack: str, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """What a stack makes of each document: the mean over its real tokens, ``(1 + blocks, documents, width)``.

    First what the first block is given, then what each block puts out, all from one forward per batch, in float64.

    Args:
        model: in evaluation mode.
        stack: its name.
        batches: for the model, each with its ``attention_mask``.

    Raises:
        LamellaError: there is no batch.
    """
    states: list[Tensor] = []
    blocks = list(model.get_submodule(stack).children())

    def given(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(BlockCall(block, args, kwargs).hidden_states)

    hooks = [blocks[0].register_forward_pre_hook(given, with_kwargs=True)]
    hooks += [block.register_forward_hook(lambda _, __, out: states.append(hidden_states_of(out))) for block in blocks]
    documents = []
    try:
        for batch in counted(batches, "reading", "batches"):
            states.clear()
            model(**batch)
            real = batch["attention_mask"].double()  # (B, T)
            sums = torch.stack([torch.einsum("btw,bt->bw", state.double(), real) for state in states])
            documents.append(sums / real.sum(dim=1)[:, None])  # (1 + blocks, B, width)
    finally:
        for hook in hooks:
            hook.remove()
    if not documents:
        raise LamellaError("There is no document to take states of. Give a text.")
    return torch.cat(documents, dim=1)
