"""Which LoRAs of a library are for a model: found out once for all that adapt the same modules."""

from dataclasses import dataclass, field

import torch
from torch import nn

from lamella.adapters.identity import check_base
from lamella.adapters.indexing import Layout
from lamella.adapters.library import AdapterLibrary
from lamella.adapters.mapping import map_to
from lamella.adapters.source import MODEL, Factors, LoraSource
from lamella.errors import LamellaError


@dataclass(frozen=True)
class Fit:
    """A library on a model.

    Attributes:
        modules: by layout, and by the model's module names, what the LoRAs call the module.
        misfits: by name, why a LoRA is not for the model.
    """

    modules: dict[Layout, dict[str, str]] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outline(LoraSource):
    """A LoRA of a library of which all but the numbers is known: its tensors are on the device "meta".

    Attributes:
        library: that has it.
    """

    library: AdapterLibrary | None = None


def outlines(library: AdapterLibrary) -> list[Outline]:
    """The LoRAs of a library, in order; those of one layout share their components."""
    components = {layout: {MODEL: _without_numbers(layout)} for layout in library.layouts}
    return [
        Outline(one.name, one.reference, one.format, one.base, components[one.layout], (), library=library)
        for one in library
    ]


def _without_numbers(layout: Layout) -> dict[str, Factors]:
    found = {}
    for module, (r, in_features, out_features, scaling) in layout:
        A, B = torch.empty(r, in_features, device="meta"), torch.empty(out_features, r, device="meta")
        found[module] = Factors(A, B, scaling)
    return found


def fit(model: nn.Module, library: AdapterLibrary) -> Fit:
    """Finds the modules of a library's LoRAs in a model, and those LoRAs that are not for it.

    A LoRA that adapts modules which the model does not have, in other widths, or that was trained on other weights, is
    none for it.
    """
    found = Fit()
    sources = {source.name: source for source in outlines(library)}
    for layout, names in library.layouts.items():
        reasons: dict[str | None, str | None] = {}  # by the base that is named
        firsts: dict[str | None, str] = {}
        for name in names:
            entry = library[name]
            if entry.base not in reasons:
                firsts[entry.base] = name
                reasons[entry.base] = _place(model, sources[name], layout, found)
            if reason := reasons[entry.base]:
                first = firsts[entry.base]
                found.misfits[name] = reason if name == first else f"{name!r} is like {first!r}: {reason}"
    return found


def _place(model: nn.Module, source: LoraSource, layout: Layout, found: Fit) -> str | None:
    """Notes where a LoRA's modules are; the reason where it is not for the model."""
    try:
        check_base(model, source)
        mapped = map_to(model, source).modules
    except LamellaError as error:
        return str(error)
    theirs = {id(factors): module for module, factors in source.components[MODEL].items()}
    found.modules[layout] = {ours: theirs[id(factors)] for ours, factors in mapped.items()}
    return None
