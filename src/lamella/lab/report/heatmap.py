"""The layer × expert heat-map: the weight that each expert gets against an even share, with each layer's entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from lamella.errors import LamellaError
from lamella.lab.report.formatting import number_text
from lamella.lab.report.sections import draw, section

if TYPE_CHECKING:
    from markupsafe import Markup

    from lamella.lab.report.report import Report


COLUMNS = ("stack", "layer", "module", "expert", "num_experts", "share", "mean_weight", "entropy", "tokens")
# Upper ends of the colour bands of the use relative to an even share; symmetric on a log scale about 1.
BANDS = (
    (0.1, "below 0.1"),
    (0.5, "0.1 to 0.5"),
    (0.8, "0.5 to 0.8"),
    (1.25, "0.8 to 1.25"),
    (2.0, "1.25 to 2"),
    (4.0, "2 to 4"),
    (math.inf, "4 and more"),
)
_STARVED = 0.1
_MEAN = "mean over modules"


@dataclass(frozen=True)
class HeatCell:
    """One expert of one layer: its weight relative to an even share as text, its colour band, the numbers behind it."""

    text: str
    band: int
    detail: str


@dataclass(frozen=True)
class HeatRow:
    """One layer: a cell per expert, None where the layer has none; entropy in percent, None where nothing is chosen."""

    layer: int
    cells: tuple[HeatCell | None, ...]
    entropy: int | None
    words: str


@dataclass(frozen=True)
class Grid:
    """The layers of one block stack; its experts by name, or by number where they have none."""

    stack: str
    experts: tuple[str, ...]
    rows: tuple[HeatRow, ...]


@dataclass(frozen=True)
class Panel:
    """What one position of the module switch shows."""

    name: str
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class RoutingView:
    """Everything the routing section shows: its findings in words and a panel per module, their mean first."""

    paragraphs: tuple[str, ...]
    panels: tuple[Panel, ...]


def routing_view(routing: pd.DataFrame) -> RoutingView | None:
    """Lay out a trace; None where it holds no row.

    Args:
        routing: a row per layer × module × expert, columns `COLUMNS`; entropy in nats, share and mean weight in 0..1;
            ``name``, if it is there, names experts that have more than a number.

    Raises:
        LamellaError: a column is missing.
    """
    absent = [name for name in COLUMNS if name not in routing.columns]
    if absent:
        raise LamellaError(f"The routing table lacks the columns {', '.join(absent)}; give the frame of a trace.")
    if routing.empty:
        return None
    numbers = routing["expert"].astype(str)
    frame = routing.assign(
        name=routing["name"].where(routing["name"].fillna("") != "", numbers) if "name" in routing else numbers,
        relative=routing["mean_weight"] * routing["num_experts"],
        certainty=[
            entropy / math.log(experts) if experts > 1 else math.nan
            for entropy, experts in zip(routing["entropy"], routing["num_experts"], strict=True)
        ],
    )
    modules = {str(name): rows for name, rows in frame.groupby("module", sort=False)}
    parts = modules if len(modules) == 1 else {_MEAN: frame, **modules}
    return RoutingView(_paragraphs(frame), tuple(Panel(name, _grids(rows)) for name, rows in parts.items()))


def _grids(frame: pd.DataFrame) -> tuple[Grid, ...]:
    return tuple(_grid(str(stack), rows) for stack, rows in frame.groupby("stack", sort=False))


def _grid(stack: str, frame: pd.DataFrame) -> Grid:
    experts = tuple(range(int(frame["expert"].max()) + 1))
    rows = tuple(_row(int(layer), rows, experts) for layer, rows in frame.groupby("layer"))
    return Grid(stack, tuple(_heading(frame, expert) for expert in experts), rows)


def _heading(frame: pd.DataFrame, expert: int) -> str:
    """A column has a name where all its layers call it so."""
    names = frame.loc[frame["expert"] == expert, "name"].unique()
    return str(names[0]) if len(names) == 1 else str(expert)


def _row(layer: int, frame: pd.DataFrame, experts: tuple[int, ...]) -> HeatRow:
    """Means over the modules of a layer that have the expert."""
    means = frame.groupby("expert")[["relative", "share", "mean_weight"]].mean()
    cells = tuple(_cell(*means.loc[expert]) if expert in means.index else None for expert in experts)
    certainty = frame["certainty"].mean()
    if frame["num_experts"].max() == 1:
        return HeatRow(layer, cells, None, "one expert")
    if math.isnan(certainty):
        return HeatRow(layer, cells, None, "no tokens")
    return HeatRow(layer, cells, round(100 * certainty), f"{100 * certainty:.0f} %")


def _cell(relative: float, share: float, weight: float) -> HeatCell:
    if math.isnan(relative):
        return HeatCell("none", 0, "no tokens reached this router")
    band = next(index for index, (end, _) in enumerate(BANDS) if round(relative, 2) < end)
    return HeatCell(f"{relative:.2f}", band, f"{share:.1%} of choices, mean weight {number_text(weight)}")


def _paragraphs(frame: pd.DataFrame) -> tuple[str, ...]:
    """What to look at first, a paragraph per stack: how many experts go unused, and the two extremes by name."""
    paragraphs = [(str(stack), " ".join(_sentences_of(rows))) for stack, rows in frame.groupby("stack", sort=False)]
    return tuple(f"{stack}: {words}" if len(paragraphs) > 1 else words for stack, words in paragraphs)


def _sentences_of(frame: pd.DataFrame) -> tuple[str, ...]:
    places = frame.groupby(["layer", "module"]).ngroups
    chosen = frame[(frame["num_experts"] > 1) & frame["relative"].notna()]
    tokens = frame["tokens"].agg(["min", "max"])
    counted = f"{tokens['max']:,.0f}" if tokens["min"] == tokens["max"] else "{min:,.0f} to {max:,.0f}".format(**tokens)
    size = f"{len(frame):,} experts in {places:,} modules, counted over {counted} decisions each."
    if chosen.empty:
        return (size, "No layer has more than one expert, so nothing was chosen.")
    starved = int((chosen["relative"] < _STARVED).sum())
    unused = f"{starved:,} of {len(chosen):,} experts" if starved else "No expert"
    verb = "get" if starved > 1 else "gets"
    low, high = chosen.iloc[chosen["relative"].argmin()], chosen.iloc[chosen["relative"].argmax()]
    return (
        size,
        f"{unused} {verb} less than a tenth of an even share.",
        f"Least used: {_place(low)}; most used: {_place(high)}.",
        *_effective(chosen),
    )


def _effective(chosen: pd.DataFrame) -> tuple[str, ...]:
    """By how many experts decisions count: not where each takes one, nor of an edition that did not keep it."""
    if "effective_experts" not in chosen or chosen["effective_experts"].isna().all():
        return ()
    routers = chosen.drop_duplicates(["layer", "module"])["effective_experts"]
    if (routers == 1).all():  # weights of several are never all the weight
        return ()
    return (
        f"By their weights, decisions count by {routers.mean():.2f} experts in the mean (1 / sum of squared weights), "
        f"{routers.min():.2f} to {routers.max():.2f} by router.",
    )


def _place(row: pd.Series) -> str:
    times = f"{row['relative']:.2f} times an even share"
    return f"layer {row['layer']}, {row['module']}, expert {row['name']} ({times})"


@section("Routing", 20)
def routing_section(report: Report) -> Markup:
    """Which experts the routers chose."""
    return draw("routing", None if report.routing is None else routing_view(report.routing), BANDS)
