"""A capture as the other steps read it: what each expert was given, and what the routers did."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lamella.errors import LamellaError, optional_module
from lamella.files import atomic
from lamella.similarity.activations.keys import hashed, unit
from lamella.similarity.activations.manifest import Manifest
from lamella.similarity.activations.reservoir import COUNTS

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Capture:
    """A uniform sample of every expert's inputs, and counts of what the routers did, on disk.

    Samples stand in the order of their keys, so that the first n of them are a uniform sample too.

    Attributes:
        folder: where it lies.
        manifest: of what it is, and how far it has come.
        counts: of each layer: captured, selected, dropped ``(E,)``, together ``(E, E)``, tokens ``()``; int64.
    """

    folder: Path
    manifest: Manifest
    counts: Mapping[int, Mapping[str, Tensor]] = field(repr=False, compare=False)

    @classmethod
    def load(cls, folder: str | Path) -> "Capture":
        """The capture in a folder; of an unfinished one, its latest checkpoint.

        Raises:
            LamellaError: there is none, or a shard is missing or broken.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        counts = {layer: _read(manifest.shard(folder, layer), COUNTS) for layer, _ in manifest.layers}
        return cls(folder, manifest, counts)

    @property
    def experts(self) -> list[tuple[int, int]]:
        """Every expert as (layer, expert)."""
        return [(layer, expert) for layer, experts in self.manifest.layers for expert in range(experts)]

    @property
    def hidden_size(self) -> int:
        """Features of an input, h."""
        return self.manifest.hidden_size

    def inputs(self, layer: int, expert: int) -> Tensor:
        """What the expert was given, float32 ``(n, h)``, n <= per_expert."""
        return self._part("inputs", layer, expert).float()

    def rows(self, layer: int, expert: int) -> Tensor:
        """The document that each sample is from, int64 ``(n,)``."""
        return self._part("rows", layer, expert)

    def positions(self, layer: int, expert: int) -> Tensor:
        """The place of each sample among the real tokens of its document, int64 ``(n,)``."""
        return self._part("positions", layer, expert)

    def keys(self, layer: int, expert: int) -> Tensor:
        """The key by which each sample was drawn, int64 ``(n,)``, ascending."""
        return self._part("keys", layer, expert)

    def split(self, layer: int, expert: int, held_out: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Indices of an expert's samples to train on, and of those held out, int64; both in key order.

        A document's side is decided by its row and the seed alone: it is the same for every expert, and no document is
        on both sides. Where samples come from few documents, a side may be small or empty.

        Raises:
            LamellaError: ``held_out`` is not between 0 and 1.
        """
        if not 0 < held_out < 1:
            raise LamellaError(f"held_out={held_out}: the share of held-out documents lies between 0 and 1.")
        apart = unit(hashed(seed, self.rows(layer, expert))) < held_out
        return torch.where(~apart)[0], torch.where(apart)[0]

    def short(self, minimum: int) -> list[tuple[int, int]]:
        """The experts with fewer samples than ``minimum``, as (layer, expert)."""
        return [(layer, e) for layer, e in self.experts if int(self.counts[layer]["captured"][e]) < minimum]

    @property
    def shares(self) -> dict[tuple[int, int], float]:
        """The share of each expert in its layer's choices, those it had no room for left out, by (layer, expert)."""
        by_layer = {layer: _shares(count).tolist() for layer, count in self.counts.items()}
        return {(layer, expert): by_layer[layer][expert] for layer, expert in self.experts}

    def check(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Refuses a model or tokenizer that this capture is not of.

        Raises:
            LamellaError: another model, or another tokenizer where both are known.
        """
        self.manifest.check(self.folder, model, tokenizer)

    @property
    def routing(self) -> "pd.DataFrame":
        """A row per expert: layer, expert, selected, dropped, tokens, captured, share.

        ``selected`` counts the real tokens that chose the expert, ``dropped`` those among them that it had no room
        for, ``tokens`` the real tokens of the layer, ``captured`` the samples kept. ``share`` is the fraction of the
        layer's selections, dropped ones left out, that fell on the expert, as in a trace; it sums to 1 over a layer
        that any token reached.
        """
        pd = optional_module("pandas", "A table of routing")

        parts = []
        for layer, count in self.counts.items():
            selected = count["selected"]
            columns = {
                "layer": layer,
                "expert": torch.arange(len(selected)).numpy(),
                "selected": selected.numpy(),
                "dropped": count["dropped"].numpy(),
                "tokens": int(count["tokens"]),
                "captured": count["captured"].numpy(),
                "share": _shares(count).numpy(),
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    @property
    def coactivation(self) -> "pd.DataFrame":
        """A row per layer and ordered pair of its experts: the share of its real tokens that chose both.

        Beside itself an expert has the share of tokens that chose it at all. Columns: layer, expert, other, share.
        """
        pd = optional_module("pandas", "A table of coactivation")

        parts = []
        for layer, count in self.counts.items():
            together = count["together"]  # (E, E)
            experts = torch.arange(len(together))
            columns = {
                "layer": layer,
                "expert": experts.repeat_interleave(len(experts)).numpy(),
                "other": experts.repeat(len(experts)).numpy(),
                "share": (together.double() / count["tokens"].clamp_min(1)).flatten().numpy(),
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def facts(self) -> dict[str, Any]:
        """How much was captured, by name."""
        selected = {layer: count["selected"] for layer, count in self.counts.items()}
        return {
            "documents": self.manifest.rows_done,
            "tokens": self.manifest.tokens,
            "experts": sum(len(one) for one in selected.values()),
            "short": [list(name) for name in self.short(self.manifest.per_expert)],
            "silent": [list(name) for name in self.short(1)],
            "smallest_share": min(self.shares.values()),
            "dropped": sum(int(count["dropped"].sum()) for count in self.counts.values()),
        }

    def in_words(self) -> list[str]:
        """The same in sentences: the text, then the experts."""
        facts = self.facts()
        silent = ", ".join(f"layer {layer} expert {expert}" for layer, expert in facts["silent"])
        return [
            f"{facts['tokens']:,} tokens of {facts['documents']:,} documents. {self.manifest.origin}",
            f"{facts['experts']} experts in {len(self.counts)} layers; {len(facts['short'])} with fewer than "
            f"{self.manifest.per_expert} samples, {len(facts['silent'])} never chosen{': ' if silent else ''}{silent}. "
            f"The smallest share of a layer's choices is {facts['smallest_share']:.1%}; {facts['dropped']:,} choices "
            "had no room.",
        ]

    def write_tables(self) -> None:
        """Writes `routing` and `coactivation` as Parquet beside the samples, each file atomically."""
        for name, table in (("routing", self.routing), ("coactivation", self.coactivation)):
            with atomic(self.folder / f"{name}.parquet") as unfinished:
                table.to_parquet(unfinished, index=False)

    def _part(self, name: str, layer: int, expert: int) -> Tensor:
        captured = self._captured(layer, expert)
        start = int(captured[:expert].sum())
        path = self.manifest.shard(self.folder, layer)
        with _opened(path) as shard:
            part: Tensor = shard.get_slice(name)[start : start + int(captured[expert])]
        return part

    def _captured(self, layer: int, expert: int) -> Tensor:
        if layer not in self.counts or not 0 <= expert < len(self.counts[layer]["captured"]):
            layers = ", ".join(f"{index} ({experts} experts)" for index, experts in self.manifest.layers)
            raise LamellaError(f"The capture in {self.folder} has no expert ({layer}, {expert}); its layers: {layers}.")
        return self.counts[layer]["captured"]


def _shares(count: Mapping[str, Tensor]) -> Tensor:
    """Of each expert of a layer, ``(E,)`` float64."""
    taken = count["selected"] - count["dropped"]
    return taken.double() / taken.sum().clamp_min(1)


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise LamellaError(
            f"The shard {path.name} in {path.parent} cannot be read: {error}. Delete the folder and capture again."
        ) from error


def _read(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    with _opened(path) as shard:
        return {name: shard.get_tensor(name) for name in names}
