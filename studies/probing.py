"""What kept probes say of which layers hold what, and of why MoLEx picks a layer; a page of docs/evidence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella.errors import LamellaError
from lamella.files import atomic
from lamella.statistics import SIGNIFICANT
from studies.tables import markdown, number, p_value

if TYPE_CHECKING:
    import pandas as pd

ROWS = Path(__file__).parent / "probing_rows"
_TABLES = ("results", "trends", "picks", "correlations")


@dataclass(frozen=True)
class KeptProbes:
    """What is kept of one call of `lamella probe` with runs: its folder."""

    folder: Path

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.name

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What was probed, and how."""
        settings: dict[str, Any] = json.loads((self.folder / "probe.json").read_text(encoding="utf-8"))
        return settings

    def table(self, name: str) -> pd.DataFrame:
        """One of results, trends, picks and correlations."""
        import pandas as pd

        return pd.read_parquet(self.folder / f"{name}.parquet")

    @property
    def trends(self) -> pd.DataFrame:
        """How each property's selectivity goes with depth."""
        return self.table("trends")

    @property
    def followed(self) -> pd.DataFrame:
        """How the picks go with each property's selectivity."""
        table = self.table("correlations")
        return table[table["measure"] == "selectivity"]


def is_probing(folder: Path) -> bool:
    """Whether a folder holds probes."""
    return (folder / "probe.json").is_file()


def keep_probing(folder: Path, into: Path = ROWS) -> str:
    """Copies the tables of probes into the folder of kept ones; gives their name.

    Raises:
        LamellaError: no run's picks stand beside the probes.
    """
    names = [*(f"{name}.parquet" for name in _TABLES), "probe.json"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise LamellaError(f"{folder} has no {missing[0]}. Probe with runs: lamella probe MODEL --run RUN -o {folder}.")
    with atomic(into / folder.name) as unfinished:
        unfinished.mkdir()
        for name in names:
            shutil.copyfile(folder / name, unfinished / name)
    return folder.name


def kept_probing(folder: Path = ROWS) -> list[KeptProbes]:
    """Those kept, by name; none where the folder is not there."""
    return [KeptProbes(path) for path in sorted(folder.glob("*")) if is_probing(path)]


def in_words(rho: float, low: float, high: float) -> str:
    """A correlation with its interval."""
    return f"{number(rho, '+')} [{number(low, '+')}, {number(high, '+')}]"


def probing_page(kept: Sequence[KeptProbes]) -> str:
    """Docs/evidence/probing.md, as Markdown; empty where nothing is kept."""
    return "\n\n".join([_HEAD, *map(_section, kept)]) + "\n" if kept else ""


def _section(one: KeptProbes) -> str:
    runs, text = one.settings["runs"], one.settings["text"]
    follows = ", ".join(one.followed[one.followed["p_holm"] < SIGNIFICANT]["property"]) or "no property"
    results = one.table("results")
    layers = sorted(results["layer"].unique())
    profile = [
        [name, rows["kind"].iloc[0], *(number(value, "+") for value in rows.sort_values("layer")["selectivity"])]
        for name, rows in results.groupby("property", sort=False)
    ]
    trends = one.trends.set_index("property")
    correlated = [
        [
            row.property,
            in_words(*trends.loc[row.property, ["rho", "low", "high"]]),
            in_words(row.rho, row.low, row.high),
            f"{number(row.random_low, '+')} to {number(row.random_high, '+')}",
            p_value(row.p_holm),
        ]
        for row in one.followed.itertuples()
    ]
    picks = one.table("picks")
    shares = picks.pivot_table(index="depth", columns="layer", values="share")
    heads = ["embeddings" if layer < 0 else f"layer {layer}" for layer in layers]
    return "\n\n".join(
        [
            f"## {one.name}",
            f"{one.settings['model']}, sentences of {text['task']}; {runs['number']} runs of MoLEx. Beyond what random "
            f"picks do, the picks follow {follows}.",
            "Selectivity: accuracy less that of the control.",
            markdown(["property", "kind", *heads], profile),
            "Rank correlations of selectivity with the layer, and of how often a layer is picked with its "
            "selectivity; p is Holm's over the properties.",
            markdown(["property", "with the layer", "with the picks", "random picks, 95 %", "p"], correlated),
            "Shares of the picks at each depth:",
            markdown(
                ["depth", *(f"layer {layer}" for layer in shares.columns)],
                [[depth, *map(number, row)] for depth, row in zip(shares.index, shares.to_numpy(), strict=True)],
            ),
        ]
    )


_HEAD = """\
# Which layers hold what, and does MoLEx pick them for it?

Linear probes of every layer, with control tasks, and the picks of MoLEx's routers beside random ones, as
`lamella probe` makes them of runs with several seeds. Intervals are 95 %, over test sentences, seeds of the probes and
runs."""
