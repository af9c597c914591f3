"""What the index of a library says of one LoRA, and how it is found out."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamella.adapters.card import CARD, Card, read_card
from lamella.adapters.directions import directions
from lamella.adapters.locate import CONFIG, exists, locate
from lamella.adapters.read import read_lora
from lamella.adapters.source import MODEL, Factors, Format, LoraSource, Reference
from lamella.errors import LamellaError

INDEX = "lamella_library.safetensors"
_READ_AS_LORA = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

WHOLE = ""  # in place of a module's name: what is held of the LoRA as a whole

Stamp = list[list[Any]]  # of each file: its name, size in bytes and time of change


class Shape(NamedTuple):
    """One module's LoRA without its numbers: the delta is ``scaling * B A``, A ``(r, in)``, B ``(out, r)``."""

    r: int
    in_features: int
    out_features: int
    scaling: float


Layout = tuple[tuple[str, Shape], ...]  # by module, as a LoRA names it


@dataclass(frozen=True)
class Entry:
    """What the index says of a LoRA.

    Attributes:
        name: in the library.
        reference: where it lies, with its digest.
        format: who wrote it.
        base: the base model it says it was trained on.
        layout: the shapes of its linear modules.
        size: of its files, in bytes.
        dtype: of its numbers.
        task: what its card says it was trained for; empty without one.
        labels: the words of that task's labels.
        card_fault: why there is a card that is not used; empty where there is none such.
        beside: what it holds besides factors of linear modules, such as a head; a library composes without it.
        stamp: of its files, by which a change is noticed.
    """

    name: str
    reference: Reference
    format: Format
    base: str | None
    layout: Layout
    size: int
    dtype: str
    task: str
    labels: tuple[str, ...]
    card_fault: str
    beside: tuple[str, ...]
    stamp: Stamp

    @property
    def ranks(self) -> tuple[int, ...]:
        """Its ranks, each once."""
        return tuple(sorted({shape.r for _, shape in self.layout}))

    @property
    def targets(self) -> tuple[str, ...]:
        """The last parts of its modules' names, each once."""
        return tuple(sorted({module.rpartition(".")[2] for module, _ in self.layout}))

    def to_dict(self, layouts: Sequence[Layout]) -> dict[str, Any]:
        """As the index writes it, with the number of its layout."""
        return {**asdict(self), "layout": layouts.index(self.layout)}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any], layouts: Sequence[Layout]) -> "Entry":
        """The way back."""
        values = {**written, "reference": Reference(**written["reference"]), "layout": layouts[written["layout"]]}
        return cls(**{**values, "labels": tuple(values["labels"]), "beside": tuple(values["beside"])})


class Held(NamedTuple):
    """What retrieval reads of one LoRA, by module ``(r, in)`` and ``(c, in)``, and as a whole ``(c, features)``."""

    directions: dict[str, Tensor]
    centroids: dict[str, Tensor]
    texts: dict[str, Tensor]


def held_of(kind: str, layout: Layout) -> list[str]:
    """Of which modules something of a kind is held."""
    return [WHOLE] if kind == "texts" else [module for module, _ in layout]


def places_in(folder: Path) -> Iterator[tuple[str, Reference]]:
    """The LoRAs that lie in a folder, by name: folders, files of their own, and the adapters of finished runs."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == INDEX:
            continue
        if path.is_dir():
            is_run = not (path / CONFIG).is_file() and (path / "adapter" / CONFIG).is_file()
            yield path.name, Reference(str(path), subfolder="adapter" if is_run else None)
        elif path.suffix in _READ_AS_LORA:
            yield path.stem, Reference(str(path))


def stamp_of(reference: Reference) -> Stamp:
    """Of the files that a reference means on this machine; none of a hub id."""
    here = Path(reference.source).expanduser()
    if not exists(here):
        return []
    place = here / reference.subfolder if reference.subfolder else here
    if place.is_dir():
        files = sorted(path for path in place.iterdir() if path.suffix in _READ_AS_LORA or path.name in (CONFIG, CARD))
    else:
        files = [place]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def examine(name: str, reference: Reference) -> tuple[Entry, Held]:
    """Reads a LoRA and says what the index is to hold of it.

    Raises:
        LamellaError: it cannot be read, adds nothing, or has no linear module.
    """
    stamp = stamp_of(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one that adds nothing, which is left out
        source = read_lora(reference, name=name)
    if source.is_zero:
        raise LamellaError(f"{source.described} adds nothing: A or B is zero in all its modules.")
    factors = linear_factors(source)
    if not factors:
        raise LamellaError(f"{source.described} has no linear module, and a library retrieves by those.")
    layout = tuple(
        (module, Shape(len(one.A), one.A.shape[1], len(one.B), one.scaling)) for module, one in factors.items()
    )
    weights = locate(replace(source.reference, sha256=None)).weights
    card, fault = _card(weights.parent, source, layout)
    entry = Entry(
        name, source.reference, source.format, source.base, layout, weights.stat().st_size,
        str(next(iter(factors.values())).A.dtype).removeprefix("torch."), card.task, card.labels, fault,
        _beside(source, factors), stamp,
    )  # fmt: skip
    centroids = {module: card.centroids.get(module, torch.zeros(1, shape.in_features)) for module, shape in layout}
    texts = torch.zeros(1, 0) if card.texts is None else card.texts
    return entry, Held({module: directions(one) for module, one in factors.items()}, centroids, {WHOLE: texts})


def _card(folder: Path, source: LoraSource, layout: Layout) -> tuple[Card, str]:
    """A LoRA's card, and why it does without the one that lies there; an empty one where there is none."""
    path = folder / CARD
    if source.format != "PEFT" or not path.is_file():  # a folder of single files is none of theirs
        return Card(), ""
    try:
        card = read_card(path)
        card.refuse_other(path, source.base, {module: shape.in_features for module, shape in layout})
    except LamellaError as error:
        return Card(), f"{error} Its LoRA is known by its weights alone, until the card is whole, written anew or gone."
    return card, ""


def linear_factors(source: LoraSource) -> dict[str, Factors]:
    """A LoRA's factors of linear modules, where its file is for one model."""
    components = source.components
    factors = components.get(MODEL, {}) if len(components) == 1 else {}
    return {module: one for module, one in factors.items() if type(one) is Factors and one.A.dim() == 2}


def _beside(source: LoraSource, linear: Mapping[str, Factors]) -> tuple[str, ...]:
    factors = [module for modules in source.components.values() for module in modules if module not in linear]
    constants = [module for modules in source.constants.values() for module in modules]
    return tuple(dict.fromkeys([*factors, *constants, *source.whole, *source.tokens]))
