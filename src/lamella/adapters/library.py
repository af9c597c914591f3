"""A library of trained LoRAs: an index of hundreds or thousands, of which only those that are used are read."""

import copy
import json
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamella.adapters.indexing import INDEX, Entry, Held, Layout, Shape, examine, held_of, places_in, stamp_of
from lamella.adapters.read import read_lora
from lamella.adapters.source import LoraSource, Reference
from lamella.errors import LamellaError
from lamella.files import atomic
from lamella.progress import counted

Place = str | Path | Reference | LoraSource
_VERSION = 2
_OPEN = 256  # LoRAs whose files stay mapped


@dataclass
class _Index:
    """What an index file holds.

    Attributes:
        entries: by name.
        left_out: by name, why, and the stamp of its files then.
        held: what retrieval reads, stacked over the entries of a layout in their order: by kind, layout and module
            ``(n, rows, in)``.
    """

    entries: dict[str, Entry]
    left_out: dict[str, tuple[str, list[Any]]]
    held: dict[tuple[str, Layout, str], Tensor]

    @cached_property
    def rows(self) -> dict[str, int]:
        """Which row of its layout's tensors is each LoRA's."""
        counts: Counter[Layout] = Counter()
        found = {}
        for name, entry in self.entries.items():
            found[name] = counts[entry.layout]
            counts[entry.layout] += 1
        return found


class AdapterLibrary:
    """Trained LoRAs by name, with what an index says of each.

    An index file, ``lamella_library.safetensors``, lies in the folder: digest, base, ranks, modules, size, and what
    retrieval reads. Only what is new or has changed is read again. LoRAs that cannot be used are in ``left_out``, each
    with the reason.

    Args:
        source: a folder of LoRAs (PEFT folders, single files, finished runs), places by name, or a list of places,
            hub ids among them.
        index: the index file of a source that is no folder, or where the folder cannot be written; None keeps it in
            the folder, or, where there is none, in memory alone.

    Raises:
        LamellaError: there is no such folder, or no LoRA that can be used.
    """

    def __init__(
        self,
        source: str | Path | Mapping[str, Place] | Sequence[Place],
        index: str | Path | None = None,
    ) -> None:
        places, twice, folder = _places(source)
        self.path = Path(index) if index is not None else None if folder is None else folder / INDEX
        before = _read_index(self.path)
        self._index, interruption = _refresh(places, before)
        self.left_out = {**twice, **{name: why for name, (why, _) in self._index.left_out.items()}}
        self._names = tuple(self._index.entries)
        self._mapped: OrderedDict[str, LoraSource] = OrderedDict()
        if not self._names and interruption is None:
            reason = next(iter(self.left_out.values()), "it is empty.")
            raise LamellaError(f"{_called(source)} holds no LoRA that can be used: {reason}")
        if self._index is not before:
            self._save()
        if interruption is not None:
            raise interruption

    @property
    def cards_left_out(self) -> dict[str, str]:
        """By name, LoRAs that lie beside a card which is not used, each with the reason."""
        return {entry.name: entry.card_fault for entry in self if entry.card_fault}

    @property
    def names(self) -> tuple[str, ...]:
        """The LoRAs, in order."""
        return self._names

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Entry]:
        return (self._index.entries[name] for name in self._names)

    def __getitem__(self, name: str) -> Entry:
        if name not in self._names:
            raise LamellaError(f"The library has no LoRA {name!r}{self._why(name)}. It has {_some(self._names)}.")
        return self._index.entries[name]

    def only(self, names: Sequence[str]) -> "AdapterLibrary":
        """The same library with some of its LoRAs, in this order; nothing is read.

        Raises:
            LamellaError: one is not in it, or none is left.
        """
        part = copy.copy(self)
        vars(part).pop("layouts", None)
        part._names = tuple(self[name].name for name in dict.fromkeys(names))
        if not part._names:
            raise LamellaError("No LoRA is left of the library; name at least one.")
        return part

    def read(self, name: str) -> LoraSource:
        """A LoRA with its tensors, mapped from its file: what is not used is not read.

        Raises:
            LamellaError: its files have changed since they were indexed, or are gone.
        """
        if name in self._mapped:
            self._mapped.move_to_end(name)
            return self._mapped[name]
        entry = self[name]
        if entry.stamp != stamp_of(entry.reference):
            raise LamellaError(
                f"The LoRA {name!r} ({entry.reference.source}) has changed since it was indexed. Open the library "
                "anew, which reads it again."
            )
        self._mapped[name] = source = read_lora(entry.reference, name=name)
        if len(self._mapped) > _OPEN:
            self._mapped.popitem(last=False)
        return source

    @cached_property
    def layouts(self) -> dict[Layout, list[str]]:
        """The LoRAs by what they adapt, ranks and scalings included."""
        found: dict[Layout, list[str]] = {}
        for entry in self:
            found.setdefault(entry.layout, []).append(entry.name)
        return found

    def held(self, kind: str, layout: Layout, module: str) -> Tensor:
        """What the index holds of one module, ``(n, rows, in)``, in the order of ``layouts[layout]``.

        Args:
            kind: "directions", the rows of ``S V^T`` (`lamella.adapters.directions`), "centroids" or "texts".
            layout: one of them.
            module: as the LoRAs of this layout name it; "" of texts.
        """
        stacked = self._index.held[kind, layout, module]
        rows = [self._index.rows[name] for name in self.layouts[layout]]
        return stacked if rows == list(range(len(stacked))) else stacked[rows]

    def _why(self, name: str) -> str:
        return f" ({self.left_out[name]})" if name in self.left_out else ""

    def _save(self) -> None:
        """Writes the index, whole or not at all; where it cannot be, it stays in memory."""
        if self.path is None:
            return
        try:
            _write_index(self.path, self._index)
        except OSError as error:
            warnings.warn(
                f"The index of the library could not be written to {self.path} ({error.strerror}): it is in memory "
                "alone, and is made anew the next time. Give another place for it, as index=.",
                stacklevel=3,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdapterLibrary":
        return self  # a copied model has the same library, which does not change

    def __repr__(self) -> str:
        return f"AdapterLibrary({len(self)} LoRAs, {len(self.left_out)} left out, index {self.path})"


def _places(source: Any) -> tuple[dict[str, Reference], dict[str, str], Path | None]:
    """The places by name, those of a name that is taken, with the reason, and the folder where there is one."""
    if isinstance(source, str | Path):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise LamellaError(f"{source} is no folder. A library is a folder of LoRAs, or their places by name.")
        given: list[tuple[str, Reference]] = list(places_in(folder))
    elif isinstance(source, Mapping | Sequence):
        folder = None
        named = source.items() if isinstance(source, Mapping) else ((_stem(place), place) for place in source)
        given = [(name, _reference(place)) for name, place in named]
    else:
        raise LamellaError(
            f"A library is a folder of LoRAs, or their places, and here a {type(source).__name__} is given."
        )
    places: dict[str, Reference] = {}
    twice: dict[str, str] = {}
    for name, reference in given:
        if name in places:
            twice[f"{name} ({reference.source})"] = (
                f"Two LoRAs are called {name!r}: {places[name].source} and {reference.source}. Rename the second."
            )
        else:
            places[name] = reference
    return places, twice, folder


def _reference(place: Place) -> Reference:
    if isinstance(place, LoraSource):
        return place.reference
    return place if isinstance(place, Reference) else Reference(str(place))


def _refresh(places: Mapping[str, Reference], before: _Index) -> tuple[_Index, KeyboardInterrupt | None]:
    """The index of what lies there now, the very same where nothing has changed; and what ended the reading early."""
    stamps = {name: stamp_of(reference) for name, reference in places.items()}
    kept = {name: e for name, e in before.entries.items() if name in places and _is_same(e, places[name], stamps[name])}
    refused = {name: (why, at) for name, (why, at) in before.left_out.items() if at and at == stamps.get(name)}
    new = [name for name in places if name not in kept and name not in refused]
    read: dict[str, tuple[Entry, Held]] = {}
    interruption = None
    try:
        for name in counted(new, "indexing", "LoRAs"):
            try:
                read[name] = examine(name, places[name])
            except (LamellaError, OSError) as error:
                refused[name] = str(error), stamps[name]
    except KeyboardInterrupt as error:  # what was read is not to be read again
        interruption = error
    if not read and len(kept) == len(before.entries) and refused == before.left_out:
        return before, interruption
    rows = {**_rows(before, kept), **{name: held for name, (_, held) in read.items()}}
    layouts: dict[Layout, Layout] = {}  # each once, so that LoRAs of one layout share it
    entries = {}
    for name in places:
        if name in rows:
            entry = kept[name] if name in kept else read[name][0]
            entries[name] = replace(entry, layout=layouts.setdefault(entry.layout, entry.layout))
    return _Index(entries, refused, _stacked(entries, rows)), interruption


def _is_same(entry: Entry, reference: Reference, stamp: list[Any]) -> bool:
    same_place = (entry.reference.source, entry.reference.subfolder) == (reference.source, reference.subfolder)
    return same_place and entry.stamp == stamp and reference.sha256 in (None, entry.reference.sha256)


def _rows(index: _Index, names: Mapping[str, Entry]) -> dict[str, Held]:
    """What an index holds of some LoRAs, one by one."""
    found: dict[str, Held] = {}
    counts: dict[Layout, int] = {}
    for name, entry in index.entries.items():
        row = counts[entry.layout] = counts.get(entry.layout, -1) + 1
        if name in names:
            found[name] = Held(
                *(
                    {module: index.held[kind, entry.layout, module][row] for module in held_of(kind, entry.layout)}
                    for kind in Held._fields
                )
            )
    return found


def _stacked(entries: Mapping[str, Entry], rows: Mapping[str, Held]) -> dict[tuple[str, Layout, str], Tensor]:
    by_layout: dict[Layout, list[Held]] = {}
    for name, entry in entries.items():
        by_layout.setdefault(entry.layout, []).append(rows[name])
    held: dict[tuple[str, Layout, str], Tensor] = {}
    for layout, of in by_layout.items():
        for kind in Held._fields:
            for module in held_of(kind, layout):
                parts = [getattr(one, kind)[module] for one in of]
                widest = max(part.shape[1] for part in parts)  # texts of a LoRA without a card have no width
                wide = [torch.nn.functional.pad(part, (0, widest - part.shape[1])) for part in parts]
                held[kind, layout, module] = torch.nn.utils.rnn.pad_sequence(wide, batch_first=True)  # (n, rows, in)
    return held


def _write_index(path: Path, index: _Index) -> None:
    layouts = list(dict.fromkeys(entry.layout for entry in index.entries.values()))
    written = {
        "version": _VERSION,
        "layouts": layouts,
        "entries": [_beside(path, entry).to_dict(layouts) for entry in index.entries.values()],
        "left_out": index.left_out,
    }
    numbers = {layout: str(number) for number, layout in enumerate(layouts)}
    tensors = {f"{kind}/{numbers[layout]}/{module}": one for (kind, layout, module), one in index.held.items()}
    with atomic(path) as unfinished:
        save_file(
            {name: one.contiguous() for name, one in tensors.items()}, unfinished, {"library": json.dumps(written)}
        )


def _read_index(path: Path | None) -> _Index:
    """An index file, its tensors mapped; an empty index where there is none, or none of this version."""
    nothing = _Index({}, {}, {})
    if path is None or not path.is_file():
        return nothing
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            written = json.loads((file.metadata() or {})["library"])
            if written["version"] != _VERSION:
                _say_anew(path, f"it is of version {written['version']}, and this one writes {_VERSION}")
                return nothing
            layouts = [tuple((module, Shape(*shape)) for module, shape in layout) for layout in written["layouts"]]
            entries = [_found_beside(path, Entry.from_dict(entry, layouts)) for entry in written["entries"]]
            held: dict[tuple[str, Layout, str], Tensor] = {}
            for key in file.keys():  # noqa: SIM118
                kind, number, module = key.split("/", 2)
                held[kind, layouts[int(number)], module] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        _say_anew(path, f"it is damaged: {error}")
        return nothing
    left_out = {name: (why, stamp) for name, (why, stamp) in written["left_out"].items()}
    return _Index({entry.name: entry for entry in entries}, left_out, held)


def _beside(path: Path, entry: Entry) -> Entry:
    """An entry as its index writes it: what lies in the index's folder by its place there, so that both may move."""
    source = Path(entry.reference.source)
    if source.parent.absolute() != path.parent.absolute():
        return entry
    return replace(entry, reference=replace(entry.reference, source=f"./{source.name}"))


def _found_beside(path: Path, entry: Entry) -> Entry:
    """The way back."""
    source = entry.reference.source
    if not source.startswith("./"):
        return entry
    return replace(entry, reference=replace(entry.reference, source=str(path.parent / source)))


def _say_anew(path: Path, why: str) -> None:
    warnings.warn(f"The index {path} is made anew: {why}.", stacklevel=5)


def _stem(place: Place) -> str:
    reference = _reference(place)
    path = Path(reference.subfolder or reference.source)
    return path.stem if path.suffix == ".safetensors" else path.name


def _called(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"A library of {len(source)} places"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
