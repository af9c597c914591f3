"""A study of expert similarity as one HTML page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from lamella.errors import LamellaError
from lamella.files import write_atomic
from lamella.lab.report.curves import Chart, line_chart, require_columns
from lamella.lab.report.pages import page_environment
from lamella.lab.report.similarity.dendrogram import tree
from lamella.lab.report.similarity.matrices import MARK, expert_matrices, layer_matrices, legend, pair_means
from lamella.lab.report.similarity.routing import routing_legend, routing_matrices
from lamella.lab.report.similarity.scatter import Scatter, scatter
from lamella.lab.report.similarity.summary import summary
from lamella.lab.report.tables import Table, frame_table, settings_sections
from lamella.similarity.compression import by_settings, differing
from lamella.similarity.swapping import kinds, layer_tables

Drawn = TypeVar("Drawn")
_STEPS = ("alignment", "screen", "swap", "compression", "rerouting")


@dataclass(frozen=True)
class SimilarityReport:
    """What the page says; a step that was not run is None and named as such.

    Attributes:
        title: of the page.
        routing: layer, expert, selected, dropped, share.
        shifts: swap, layer, expert, share_before, share_after.
        screen: a row per ordered pair: floor, cka_distance, weight_distance, coactivation.
        alignment: a row per ordered pair, aligner, seed and kind, as ``align`` gives them.
        controls: tables of controls by caption, first column "control".
        swap: a row per swap, as ``swap_effects`` gives them.
        distance: `distance_regressions` of these swaps.
        compression: method, budget, domain, ratio, low, high.
        rerouting: how, what, reach, domain, perplexity, baseline, ratio, low, high.
        histogram: norms of tokens: layer, side ("input" or "output"), norm, share.
        plane: tokens in their principal plane: layer, expert, side, x, y.
        settings: of the capture and of each step, nested.
        notes: what was skipped and why.
    """

    title: str
    routing: pd.DataFrame | None = None
    shifts: pd.DataFrame | None = None
    screen: pd.DataFrame | None = None
    alignment: pd.DataFrame | None = None
    controls: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    swap: pd.DataFrame | None = None
    distance: Mapping[str, Mapping[str, float]] | None = None
    compression: pd.DataFrame | None = None
    rerouting: pd.DataFrame | None = None
    histogram: pd.DataFrame | None = None
    plane: pd.DataFrame | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def render_similarity(report: SimilarityReport) -> str:
    """The whole page: nothing loaded from elsewhere, every text escaped, no script.

    Raises:
        LamellaError: a table lacks a column it must have.
    """
    pairs = {} if report.alignment is None else pair_means(report.alignment)
    _check_regressions(report.distance or {})
    parts: dict[str, Any] = {
        "layers": _by_aligner(pairs, layer_matrices),
        "experts": _by_aligner(pairs, expert_matrices),
        "controls": [_table(frame, caption) for caption, frame in report.controls.items()],
        "trees": _by_aligner(pairs, tree),
        "routing": routing_matrices(report.routing, report.shifts),
        "distributions": _norms(report.histogram),
        "plane": _planes(report.plane),
        "swaps": _swap_charts(report.swap, report.distance),
        "compression": _compression_charts(report.compression),
        "rerouting": _tables(report.rerouting, _REROUTED, "What becomes of tokens whose expert is gone"),
    }
    return (
        page_environment()
        .get_template("similarity/page.html.j2")
        .render(
            report=report,
            summary=summary(report.alignment, report.distance, report.swap, report.compression),
            legend=legend(),
            mark=MARK,
            routing_legend=routing_legend(),
            swap_tables=[] if report.swap is None else [*_layouts(report.swap), *_worst_swaps(report.swap)],
            compression_tables=_compression_tables(report.compression),
            sections=settings_sections(report.settings),
            contents=[name for name in _CONTENTS if parts[_CONTENTS[name]]],
            absent=[name for name in _STEPS if getattr(report, name) is None],
            **parts,
        )
    )


def write_similarity(report: SimilarityReport, path: Path) -> None:
    """Writes the page, whole or not at all."""
    write_atomic(path, render_similarity(report))


_CONTENTS = {
    "Compression": "compression",
    "Layers": "layers",
    "Experts": "experts",
    "Controls": "controls",
    "Clusters": "trees",
    "Routing": "routing",
    "Distributions": "distributions",
    "Swaps": "swaps",
    "Rerouting": "rerouting",
}
_REGRESSION = ("slope", "intercept", "low", "high", "spearman", "p_value", "least_p", "layers", "level")
_SWAP = (
    "unit", "first_layer", "first_expert", "second_layer", "second_expert", "exchange", "aligned", "distance", "metric",
    "baseline", "value", "effect", "low", "high", "seed",
)  # fmt: skip
_REROUTED = ("how", "what", "reach", "domain", "perplexity", "baseline", "ratio")
_COMPRESSED = ("method", "budget", "domain", "experts_left", "parameters", "perplexity", "baseline", "ratio")
_MOST_SWAPS = 12


def _by_aligner(pairs: Mapping[str, pd.DataFrame], draw: Callable[[pd.DataFrame], Drawn]) -> list[tuple[str, Drawn]]:
    """What there is to draw of each aligner's pairs."""
    return [(aligner, drawn) for aligner, rows in pairs.items() if (drawn := draw(rows))]


def _check_regressions(distance: Mapping[str, Mapping[str, float]]) -> None:
    for name, regression in distance.items():
        if missing := [part for part in _REGRESSION if part not in regression]:
            raise LamellaError(
                f"The regression of {name} on the distance has no {missing[0]}: another version of lamella noted it. "
                "Run `lamella similarity swap` on the study again; what was swapped is not swapped again."
            )


def _table(frame: pd.DataFrame, caption: str) -> Table:
    return frame_table(frame.reset_index(drop=True), caption, missing="not run", first=str(frame.columns[0]))


def _tables(frame: pd.DataFrame | None, columns: tuple[str, ...], caption: str) -> list[Table]:
    """Those columns of a step's table and the interval of the ratio as one; nothing where the step was not run."""
    if frame is None:
        return []
    require_columns(frame, (*columns, "low", "high"), columns[0])
    shown = frame[list(columns)].assign(interval=list(zip(frame["low"], frame["high"], strict=True)))
    return [_table(shown, caption)]


def _norms(histogram: pd.DataFrame | None) -> tuple[Chart, ...]:
    if histogram is None:
        return ()
    require_columns(histogram, ("layer", "side", "norm", "share"), "norms")
    charts = []
    for side, rows in histogram.groupby("side"):
        named = rows.assign(layer=[f"layer {layer}" for layer in rows["layer"]])
        title = f"Norm of an expert's {side}, with where it is most often"
        charts.append(line_chart(named, "layer", "norm", "share", title, reach=[0.0], distribution=True))
    return tuple(chart for chart in charts if chart)


def _planes(plane: pd.DataFrame | None) -> tuple[Scatter, ...]:
    if plane is None:
        return ()
    require_columns(plane, ("layer", "expert", "side", "x", "y"), "principal planes")
    charts = []
    for side, rows in plane.groupby("side"):
        places = list(zip(rows["layer"], rows["expert"], strict=True))
        named = rows.rename(columns={"x": "first component", "y": "second component"}).assign(
            group=[f"layer {layer}" for layer, _ in places],
            words=[f"layer {layer}, expert {expert}" for layer, expert in places],
        )
        charts.append(
            scatter(
                named, x="first component", y="second component", group="group", words="words",
                title=f"Experts' {side}s",
            )
        )  # fmt: skip
    return tuple(chart for chart in charts if chart)


def _swap_charts(swap: pd.DataFrame | None, distance: Mapping[str, Mapping[str, float]] | None) -> tuple[Scatter, ...]:
    if swap is None:
        return ()
    require_columns(swap, _SWAP, "swaps")
    charts = []
    for name, rows in kinds(swap).items():
        what = f"change of {rows['metric'].iloc[0]}"
        named = rows.rename(columns={"effect": what}).assign(words=_swap_words(rows))
        chart = scatter(
            named, x="distance", y=what, group="unit", words="words", reach=[0.0],
            title=f"Change over distance: {name}", line=(distance or {}).get(name),
        )  # fmt: skip
        charts.append(chart)
    return tuple(chart for chart in charts if chart)


def _layouts(swap: pd.DataFrame) -> list[Table]:
    """The scores after swaps of whole layers, layers by layers."""
    tables = []
    for name, scores in layer_tables(swap).items():
        baseline = kinds(swap)[name]["baseline"].iloc[0]
        shown = scores.rename(index=str, columns=str).reset_index(names="layer")
        caption = f"Score after a swap of two layers: {name}; {baseline:.4f} without"
        tables.append(frame_table(shown, caption, missing="", first="layer"))
    return tables


def _swap_words(swap: pd.DataFrame) -> list[str]:
    names = zip(
        swap["first_layer"], swap["first_expert"], swap["second_layer"], swap["second_expert"], strict=True
    )  # fmt: skip
    return [f"{_part(a, b)} and {_part(c, d) if c >= 0 else 'random weights'}" for a, b, c, d in names]


def _part(layer: int, expert: int) -> str:
    return f"expert {expert} of layer {layer}" if expert >= 0 else f"layer {layer}"


def _worst_swaps(swap: pd.DataFrame) -> list[Table]:
    rows = swap.reindex(swap["effect"].abs().sort_values(ascending=False).index[:_MOST_SWAPS])
    shown = pd.DataFrame(
        {
            "swap": _swap_words(rows),
            "unit": list(rows["unit"]),
            "distance": list(rows["distance"]),
            "metric": list(rows["metric"]),
            "effect": list(rows["effect"]),
            "interval": list(zip(rows["low"], rows["high"], strict=True)),
        }
    )
    return [_table(shown, "The largest effects")]


def _compression_tables(compression: pd.DataFrame | None) -> list[Table]:
    if compression is None:
        return []
    method, *others = _COMPRESSED
    return _tables(compression, (method, *differing(compression), *others), "All budgets")


def _compression_charts(compression: pd.DataFrame | None) -> tuple[Chart, ...]:
    if compression is None:
        return ()
    require_columns(compression, ("method", "budget", "domain", "ratio", "low", "high"), "compression")
    charts = []
    parts = [
        (f"{domain}{f', {settings}' if settings else ''}", rows)
        for settings, of in by_settings(compression).items()
        for domain, rows in of.groupby("domain", sort=False)
    ]
    for name, rows in parts:
        means = rows.groupby(["method", "budget"], as_index=False)[["ratio", "low", "high"]].mean()
        named = means.assign(**{"% of expert parameters removed": 100 * (1 - means["budget"])})
        charts.append(
            line_chart(
                named, "method", "% of expert parameters removed", "ratio", f"Perplexity ratio on {name}",
                reach=[1.0], whiskers=("low", "high"),
            )
        )  # fmt: skip
    return tuple(chart for chart in charts if chart)
