"""Which sequence each token belongs to: its row, or one of the documents that are packed into the row.

What the documents are is read from what a stack is given, in this order: a mask expanded for attention (tokens that
are connected are one document), ``seq_idx``, cumulative lengths (``cu_seq_lens_q`` and the like), an attention mask
that numbers the documents, and ``position_ids`` that start anew, by transformers' own rule where no mask is given.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lamella.errors import LamellaError
from lamella.routing.masks import expanded_mask

_CUMULATIVE = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens")


class Sequences(Protocol):
    """The sequences of a batch of rows, in the order in which they begin.

    Attributes:
        count: S, how many there are.
    """

    @property
    def count(self) -> int:
        """Number of sequences, S."""

    @property
    def packed(self) -> bool:
        """Whether any row holds several."""

    def total(self, values: Tensor) -> Tensor:
        """Sums ``(batch, tokens, ...)`` over each sequence: ``(S, ...)``."""

    def running(self, values: Tensor) -> Tensor:
        """Sums ``(batch, tokens)`` over each sequence's tokens so far, this one included; of the same shape."""

    def spread(self, values: Tensor) -> Tensor:
        """What each token's sequence has: ``(batch, tokens, ...)`` from ``(S, ...)``, or ``(batch, 1, ...)``."""

    def by_row(self, values: Tensor) -> Tensor | None:
        """What each row's only sequence has: ``(batch, ...)`` from ``(S, ...)``; None where rows hold several."""

    @property
    def mixed(self) -> Tensor | bool:
        """Whether any row holds several, where it has to be computed to be known: a scalar."""


@dataclass(frozen=True)
class Rows:
    """One sequence in each of ``count`` rows."""

    count: int
    packed = mixed = False

    def total(self, values: Tensor) -> Tensor:
        """Sums over each row."""
        return values.sum(dim=1)

    def running(self, values: Tensor) -> Tensor:
        """Sums along each row."""
        return values.cumsum(dim=1)

    def spread(self, values: Tensor) -> Tensor:
        """The same for a whole row: ``(batch, 1, ...)``."""
        return values[:, None]

    def by_row(self, values: Tensor) -> Tensor | None:
        """The same."""
        return values


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents packed into rows.

    Attributes:
        of: the number of each token's document, counted through the rows, ``(batch, tokens)``.
        count: how many there are.
    """

    of: Tensor
    count: int
    packed = mixed = True

    def total(self, values: Tensor) -> Tensor:
        """Sums over each document."""
        summed = torch.promote_types(values.dtype, torch.int64) if not values.is_floating_point() else values.dtype
        empty = values.new_zeros(self.count, *values.shape[2:], dtype=summed)  # (S, ...)
        return empty.index_add(0, self.of.flatten(), values.flatten(0, 1).to(summed))

    def running(self, values: Tensor) -> Tensor:
        """Sums along each document, wherever its tokens lie in the rows."""
        of = self.of.flatten()  # (N,)
        order = of.argsort(stable=True)  # (N,): the documents' tokens behind each other
        so_far = values.flatten()[order].cumsum(dim=0)  # (N,)
        sizes = of.new_zeros(self.count).index_add(0, of, torch.ones_like(of))  # (S,)
        begins = sizes.cumsum(dim=0) - sizes  # (S,): how many tokens lie before each document
        before = torch.nn.functional.pad(so_far, (1, 0))[begins]  # (S,): what those have
        return torch.empty_like(so_far).index_copy(0, order, so_far - before[of[order]]).view(values.shape)

    def spread(self, values: Tensor) -> Tensor:
        """Each token's own: ``(batch, tokens, ...)``."""
        return values[self.of.to(values.device)]

    def by_row(self, values: Tensor) -> Tensor | None:
        """Nothing: rows hold several."""
        return None


@dataclass(frozen=True, eq=False)
class Places(Documents):
    """The same where no number may be looked at, as in code that is traced: there is room for one at each token.

    A document has the number of the place where it begins among the tokens of all rows; most places have none.

    Attributes:
        in_row: which rows hold several, ``(batch,)``.
    """

    in_row: Tensor

    @property
    def mixed(self) -> Tensor:  # type: ignore[override]
        """Whether any row holds several, a scalar."""
        return self.in_row.any()

    def by_row(self, values: Tensor) -> Tensor | None:
        """What each row's first document has; it means nothing for `in_row`."""
        return values[self.of[:, 0].to(values.device)]


class Packing:
    """What the arguments of one forward of a stack say of the documents in its rows."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        names = ("attention_mask", "seq_idx", "position_ids", *_CUMULATIVE)
        self._said = {name: arguments[name] for name in names if arguments.get(name) is not None}
        self._found: dict[tuple[torch.Size, torch.device], Sequences] = {}

    @property
    def speaks(self) -> bool:
        """Whether there is any argument that could say it."""
        return bool(self._said)

    @property
    def spans_rows(self) -> bool:
        """Whether lengths are counted through all rows, so that no row can be left out."""
        return any(name in self._said for name in _CUMULATIVE)

    def sequences(self, real: Tensor, traced: bool = False) -> Sequences:
        """The sequences of rows in which ``real (batch, tokens)`` are the real tokens.

        Args:
            real: which they are.
            traced: whether to find them without looking at any number, if that is possible.

        Raises:
            LamellaError: rows of another shape hold several documents.
        """
        if traced:
            numbers = self._numbers(real, traced)
            if numbers is None:
                return Rows(real.shape[0])
            if numbers.shape[1] == real.shape[1] and numbers.shape[0] in (1, real.shape[0]):
                return place_documents(numbers.to(real.device).expand(real.shape), real)
        key = (real.shape, real.device)
        if key not in self._found:
            self._found[key] = self._find(real)
        return self._found[key]

    def _find(self, real: Tensor) -> Sequences:
        numbers = self._numbers(real)
        batch, tokens = real.shape
        if numbers is None or bool((numbers == numbers[:, :1]).all()):
            return Rows(batch)
        if numbers.shape[1] != tokens or numbers.shape[0] not in (1, batch):
            raise LamellaError(
                f"The model is given documents packed into rows of {numbers.shape[1]} tokens, and a decision for whole "
                f"sequences is to be taken for rows of {tokens}, of which nobody says which document they belong to. "
                "Give each document a row of its own."
            )
        return number_documents(numbers.to(real.device).expand(batch, -1), real)

    def _numbers(self, real: Tensor, traced: bool = False) -> Tensor | None:
        """A number for each token that is its document's alone in its row, ``(batch or 1, tokens)``; None unsaid."""
        mask = self._said.get("attention_mask")
        expanded = expanded_mask(mask)
        if expanded is not None:
            return _connected(expanded) if expanded.shape[-1] == expanded.shape[-2] else None
        index = self._said.get("seq_idx")
        if isinstance(index, Tensor):
            return index.view(-1, index.shape[-1])
        for name in _CUMULATIVE:
            if isinstance(self._said.get(name), Tensor):
                return _by_lengths(self._said[name], real.shape)
        positions = self._said.get("position_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point() and mask.dtype != torch.bool:
            if traced:
                by_positions = _by_positions(positions, real, is_masked=True)
                return mask if by_positions is None else torch.where((mask > 1).any(), mask, by_positions)
            if bool((mask > 1).any()):
                return mask
        return _by_positions(positions, real, is_masked=mask is not None)


def watch_for_mixing(
    stack: nn.Module,
    documents: Documents,
    lengths_given: bool,
    still_runs: Callable[[], bool],
    warn: Callable[[str], None],
) -> None:
    """Warns where a stack's own attention lets documents of a row see each other, by what its next layer is given.

    Args:
        stack: a transformer whose forward is running.
        documents: of that forward.
        lengths_given: whether it is told their lengths, which flash attention reads.
        still_runs: whether that forward is the one that runs.
        warn: is told at most once.
    """
    handles: list[RemovableHandle] = []

    def look(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for handle in handles:
            handle.remove()
        if not still_runs():  # it had no further attention layer, or was interrupted
            return
        implementation = str(getattr(getattr(stack, "config", None), "_attn_implementation", None))
        mask, of = kwargs.get("attention_mask"), documents.of
        if "flash" in implementation:
            mixes = mask is not None or (len(of) > 1 and not lengths_given)
        else:
            attends = expanded_mask(mask)
            if attends is None or attends.shape[1:] == (of.shape[1], of.shape[1]):
                apart = of[:, :, None] != of[:, None]  # (batch, tokens, tokens)
                mixes = attends is None or bool((attends.to(of.device) & apart).any())
            else:
                return
        if mixes:
            warn(
                f"A row holds several documents, and the attention of {type(stack).__name__} ({implementation}) lets "
                "them see each other, whatever adapter it has. transformers keeps them apart by position_ids alone "
                "with use_cache=False and no attention_mask; otherwise give a block-diagonal mask, or each document a "
                "row of its own."
            )

    for module in stack.modules():
        if hasattr(module, "is_causal"):  # as transformers' attention layers are, whatever implements them
            handles.append(module.register_forward_pre_hook(look, with_kwargs=True))


def number_documents(numbers: Tensor, real: Tensor) -> Sequences:
    """The sequences of rows whose tokens have numbers, ``(batch, tokens)``; padding belongs to none of its own."""
    batch, tokens = numbers.shape
    numbers = _with_padding(numbers, real)
    keyed = torch.stack([torch.arange(batch, device=numbers.device)[:, None].expand_as(numbers), numbers], dim=-1)
    unique, of = keyed.view(-1, 2).unique(dim=0, return_inverse=True)
    if len(unique) == batch:
        return Rows(batch)
    # Numbered as they begin, whatever numbers they were given.
    begins = torch.full((len(unique),), batch * tokens, device=of.device)
    begins = begins.scatter_reduce(0, of, torch.arange(len(of), device=of.device), "amin")
    rank = begins.argsort().argsort()
    return Documents(rank[of].view(batch, tokens), len(unique))


def place_documents(numbers: Tensor, real: Tensor) -> Places:
    """The same by operations whose shapes are known before any number is."""
    batch, tokens = numbers.shape
    ordered, order = _with_padding(numbers, real).sort(dim=1, stable=True)  # (batch, tokens), (batch, tokens)
    place = torch.arange(tokens, device=numbers.device)
    begins = (ordered.diff(dim=1, prepend=ordered[:, :1]) != 0) * place  # 0 but for the first token of each later one
    first = order.gather(1, begins.cummax(dim=1).values)  # (batch, tokens): of the document, in the order of numbers
    first = torch.empty_like(first).scatter(1, order, first)
    in_row = (first != first[:, :1]).any(dim=1)
    return Places(first + tokens * torch.arange(batch, device=numbers.device)[:, None], batch * tokens, in_row)


def _with_padding(numbers: Tensor, real: Tensor) -> Tensor:
    """Padding has the number of its row's first real token."""
    return torch.where(real, numbers, numbers.gather(1, real.int().argmax(dim=1, keepdim=True)))


def _connected(attends: Tensor) -> Tensor:
    """For each token the first one that attention connects it with, over whatever others, ``(batch, tokens)``."""
    batch, tokens, _ = attends.shape
    found = torch.empty(batch, tokens, dtype=torch.int32, device=attends.device)
    for row in range(batch):  # one at a time: the pairs of a long row are many
        pairs = attends[row] | attends[row].t()  # (tokens, tokens)
        first = torch.arange(tokens, dtype=torch.int32, device=attends.device)
        while True:
            reached = torch.where(pairs, first, tokens).amin(dim=1).minimum(first)  # (tokens,)
            reached = reached[reached.long()]
            if torch.equal(reached, first):
                break
            first = reached
        found[row] = first
    return found


def _by_lengths(cumulative: Tensor, shape: torch.Size) -> Tensor:
    """By where each document ends among the tokens of all rows behind each other."""
    ends = cumulative.flatten()[1:]
    if bool((ends > shape.numel()).any()):
        return torch.arange(int(ends[-1]))[None]  # of other rows than these
    tokens = torch.arange(shape.numel(), device=ends.device, dtype=ends.dtype)
    return torch.bucketize(tokens, ends, right=True).view(shape)


def _by_positions(positions: Any, real: Tensor, is_masked: bool) -> Tensor | None:
    """By positions that do not go on; where a mask says which tokens are real, among those."""
    if not isinstance(positions, Tensor):
        return None
    if positions.dim() == 3 and positions.shape[::2] == (4, real.shape[1]):  # the text's, then time, height, width
        positions = positions[0]
    if positions.dim() == 1:
        positions = positions[None]
    if positions.dim() != 2:
        return None
    if not is_masked:  # transformers' own rule, by which its masks keep documents apart
        return positions.diff(dim=1, prepend=positions[:, :1] - 1).ne(1).cumsum(dim=1)
    if positions.shape[1] != real.shape[1]:
        return None
    # Padding has positions of all kinds, and under a mask one sequence may have gaps: only going back begins anew.
    positions = positions.to(real.device).expand_as(real)
    place = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, place, -1).cummax(dim=1).values.roll(1, dims=1)  # (batch, tokens): the real one before
    last[:, 0] = -1
    goes_back = positions <= positions.gather(1, last.clamp_min(0))
    return (real & (last >= 0) & goes_back).cumsum(dim=1)
