"""LoRAs of a library on a model: none of them is in memory until a sequence has it on its shortlist."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamella.adapters import AdapterLibrary, LoraSource, Reference, fit
from lamella.adapters.fitting import Outline, outlines
from lamella.adapters.indexing import WHOLE, Layout, held_of, linear_factors
from lamella.adapters.keys import RetrievalKey, key_named
from lamella.adapters.keys.registry import Score
from lamella.errors import LamellaError
from lamella.kernels.chosen import mix_chosen

WITHOUT_TEXT = "spectrum"  # the key of rows of which nothing says what text they are of
_HELD = 32  # LoRAs of a module that are kept at hand, or as many as a batch has on its shortlists


def embedding_of(model: Any) -> nn.Module | None:
    """What embeds the tokens by which a model decides; None of a model without, or whose decoder reads another text."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    find = getattr(model, "get_input_embeddings", None)
    return None if find is None else find()


@dataclass(frozen=True)
class Stock:
    """A library as it is composed on a model.

    Attributes:
        library: the K LoRAs, in the order of the logits.
        modules: by layout, and by the model's module names, what the LoRAs call the module.
        key: by which shortlists are made.
    """

    library: AdapterLibrary
    modules: dict[Layout, dict[str, str]]
    key: RetrievalKey

    def shelf(self, module: str) -> "Shelf":
        """The LoRAs of one of the model's modules."""
        theirs = {
            name: self.modules[layout].get(module) for layout, names in self.library.layouts.items() for name in names
        }
        return Shelf(self.library, [theirs[name] for name in self.library.names])

    def table(self, modules: Sequence[str], of_sequences: bool) -> "KeyTable":
        """What retrieval reads of the LoRAs in some of the model's modules.

        Args:
            modules: what a group reads.
            of_sequences: whether it is given sequences; of other rows nothing says which text they are of.
        """
        key = self.key if of_sequences or self.key.reads != "texts" else key_named(WITHOUT_TEXT)
        places = {name: place for place, name in enumerate(self.library.names)}
        parts = []
        for module in [WHOLE] if key.reads == "texts" else modules:
            for layout, names in self.library.layouts.items():
                theirs = WHOLE if module == WHOLE else self.modules[layout].get(module)
                if theirs is not None:
                    indices = torch.tensor([places[name] for name in names])
                    parts.append((indices, self.library.held(key.reads, layout, theirs)))
        return KeyTable(key, len(self.library), parts)


def stock_of(
    model: nn.Module, adapters: Mapping[str, Any], retrieval: str, wanted: int
) -> tuple[Stock, list[LoraSource]]:
    """The LoRAs of a config that are to be shortlisted, and what of them is known without their numbers.

    Args:
        model: the base.
        adapters: by name references as a config has them, or LoRAs of a library that is open.
        retrieval: the key.
        wanted: LoRAs of a shortlist.

    Raises:
        LamellaError: fewer LoRAs than that, one that cannot be read or is of another base, no card to read, or a model
            of whose texts nothing can be read.
    """
    given = list(adapters.values())
    opened = next((one.library for one in given if isinstance(one, Outline)), None)
    if opened is None:
        places = {
            name: one.reference if isinstance(one, LoraSource) else Reference(**one) for name, one in adapters.items()
        }
        opened = AdapterLibrary(places)
        if opened.left_out:
            raise LamellaError(next(iter(opened.left_out.values())))
    if wanted > len(adapters):
        raise LamellaError(f"shortlist={wanted} is more than the {len(adapters)} LoRAs of the composition. Lower it.")
    library, key = opened.only(list(adapters)), key_named(retrieval)
    found = fit(model, library)
    if found.misfits:
        raise LamellaError(next(iter(found.misfits.values())))
    if key.reads == "texts":
        _refuse_no_texts(model, library)
    if key.reads != "directions":
        _refuse_no_cards(library, key)
    more = [entry for entry in library if entry.beside]
    if more:
        warnings.warn(
            f"{len(more)} of {len(library)} LoRAs were trained with more than factors of linear modules, first "
            f"{more[0].name!r} with {more[0].beside[0]}: a shortlist composes without it, on what the base has there.",
            stacklevel=2,
        )
    return Stock(library, found.modules, key), list(outlines(library))


def _refuse_no_texts(model: nn.Module, library: AdapterLibrary) -> None:
    """Raises where a model has no text embeddings, or others than the cards."""
    embedding = embedding_of(model)
    if embedding is None:
        raise LamellaError(
            f"retrieval='text' reads the embeddings of a prompt's tokens, and {type(model).__name__} has none, or is "
            "an encoder-decoder, whose decoder is given other tokens. Choose 'centroids', 'spectrum' or 'arrow'."
        )
    width = getattr(embedding, "embedding_dim", None)
    for layout, names in library.layouts.items():
        has = library.held("texts", layout, WHOLE).shape[-1]
        if has and width is not None and has != width:
            raise LamellaError(
                f"Cards of {names[0]!r} and LoRAs like it have text embeddings of {has} numbers, and the model's have "
                f"{width}: they are of another base. Write them anew (lamella library index, --examples NAME=TASK)."
            )


def _refuse_no_cards(library: AdapterLibrary, key: RetrievalKey) -> None:
    """Raises where LoRAs have no card for a key that reads it, or none that can be used."""
    without = []
    for layout, names in library.layouts.items():
        held = [library.held(key.reads, layout, module) for module in held_of(key.reads, layout)]  # (n, rows, in) each
        without += [name for at, name in enumerate(names) if not any(bool(one[at].any()) for one in held)]
    if without:
        why = library.cards_left_out.get(without[0], "")
        raise LamellaError(
            f"retrieval={key.name!r} reads a LoRA's card, and {len(without)} of {len(library)} have none to read, "
            f"first {without[0]!r}{f' ({why})' if why else ''}. Write one (lamella library index FOLDER --examples "
            "NAME=TASK); or choose 'spectrum' or 'arrow', which read weights, or leave the LoRA out."
        )


class KeyTable:
    """The retrieval keys of K LoRAs in the modules that a group reads, or of their texts.

    Args:
        key: the score.
        count: K.
        parts: by module and layout, which LoRAs, ``(n,)``, and what the index holds of them, ``(n, rows, in)``.
    """

    def __init__(self, key: RetrievalKey, count: int, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._key, self._count, self._parts = key, count, parts
        self._scorers: tuple[torch.device, list[tuple[Tensor, Score]]] | None = None

    @property
    def of_texts(self) -> bool:
        """Whether what is scored is a text embedding, and not a module's input."""
        return self._key.reads == "texts"

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Each LoRA's score for inputs ``(S, in)``, summed over modules, ``(S, K)``; 0 for a LoRA that has none."""
        x = x.float()
        if self._scorers is None or self._scorers[0] != x.device:
            made = [(indices.to(x.device), self._key.scorer(held.to(x.device))) for indices, held in self._parts]
            self._scorers = x.device, made
        total = x.new_zeros(len(x), self._count)
        for indices, score in self._scorers[1]:
            total.index_add_(1, indices, score(x))
        return total

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeyTable":
        return KeyTable(self._key, self._count, self._parts)  # what the index holds is mapped once


class Shelf(nn.Module):
    """The K LoRAs of one module, read from their files when a sequence has chosen them.

    Args:
        library: the LoRAs.
        modules: what each calls the module; None for a LoRA that does not have it.
    """

    def __init__(self, library: AdapterLibrary, modules: Sequence[str | None]) -> None:
        super().__init__()
        self._library, self._theirs = library, list(modules)
        shapes = [dict(one.layout)[module] for one, module in zip(library, modules, strict=True) if module is not None]
        self._sides = shapes[0].in_features, shapes[0].out_features
        self._stocked: list[int] = []  # whose numbers are at hand, by place
        self._places = torch.full((len(self._theirs),), -1)  # (K,), -1 for a LoRA that is not
        self._at_hand = torch.zeros(0, 0, self._sides[0]), torch.zeros(0, 0, self._sides[1])  # (P, r, in), (P, r, out)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def ranks(self) -> list[int]:
        """Each LoRA's rank, 0 where it does not have the module."""
        return [
            0 if module is None else dict(entry.layout)[module].r
            for module, entry in zip(self._theirs, self._library, strict=True)
        ]

    def mix(self, y: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """The module's output ``(*rows, out)`` with its weighted LoRAs, of an input ``(*rows, in)``.

        Args:
            y: the output without them.
            x: the input.
            weights: G, ``(K,)``, ``(batch, K)`` or ``(batch, tokens, K)``; only LoRAs with a weight are read.
        """
        weights = weights[None] if weights.dim() == 1 else weights
        sequences = len(weights)
        used = weights.detach().reshape(sequences, -1, weights.shape[-1]).abs().amax(dim=1)  # (S, K)
        count = max(1, int(used.ne(0).sum(dim=1).max()))
        chosen = used.topk(count, dim=-1).indices.sort(dim=-1).values  # (S, n)
        A, B = self.take(chosen, x.device)
        places = chosen if weights.dim() == 2 else chosen[:, None].expand(-1, weights[0, ..., 0].numel(), -1)
        flat = weights if weights.dim() == 2 else weights.flatten(1, -2)  # (S, K) or (S, T, K)
        rows = x.reshape(sequences, -1, x.shape[-1])  # (S, T, in)
        mixed = mix_chosen(y.reshape(sequences, -1, y.shape[-1]), rows, flat.gather(-1, places), A, B)
        return mixed.view(y.shape)

    def take(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """A ``(S, n, r, in)`` and B transposed, its scaling inside, ``(S, n, r, out)``, of LoRAs ``chosen (S, n)``.

        LoRAs of a lower rank than the highest at hand have rows of zeros.
        """
        if self._last is None or self._last[1].device != device or not torch.equal(self._last[0], chosen):
            places = self._places.to(chosen.device)[chosen]  # (S, n)
            if self._at_hand[0].device != device or bool((places < 0).any()):
                self._restock(chosen.unique().tolist(), device)
                places = self._places.to(chosen.device)[chosen]
            A, B = self._at_hand
            self._last = chosen, A[places], B[places]
        return self._last[1:]

    def _restock(self, numbers: Sequence[int], device: torch.device) -> None:
        """Brings some LoRAs to hand; those that were there before stay as long as there is room."""
        before = {number: place for place, number in enumerate(self._stocked)}
        kept = [*numbers, *(number for number in self._stocked if number not in numbers)]
        stocked = kept[: max(len(numbers), _HELD)]
        A, B = self._at_hand
        loras = [
            (A[before[number]].to(device), B[before[number]].to(device))
            if number in before
            else self._of_file(number, device)
            for number in stocked
        ]  # where one cannot be read, those at hand stay as they were
        r = max(len(A) for A, _ in loras)
        padded = [[nn.functional.pad(one, (0, 0, 0, r - len(one))) for one in pair] for pair in loras]
        downs, ups = zip(*padded, strict=True)
        self._at_hand = torch.stack(downs), torch.stack(ups)
        self._stocked = stocked
        self._places = torch.full_like(self._places, -1)
        self._places[torch.tensor(stocked)] = torch.arange(len(stocked))

    def _of_file(self, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """A ``(r, in)`` and B transposed, its scaling inside, ``(r, out)``, of one LoRA."""
        module = self._theirs[number]
        if module is None:
            return torch.zeros(0, self._sides[0], device=device), torch.zeros(0, self._sides[1], device=device)
        lora = linear_factors(self._library.read(self._library.names[number]))[module]
        wide = torch.promote_types(lora.B.dtype, torch.float32)
        return lora.A.to(device, wide), (lora.B.to(device, wide) * lora.scaling).t()
