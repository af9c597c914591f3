"""What the layers of a model hold, and whether a router picks them, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lamella.files import write_atomic
from lamella.lab.report.curves import Chart, line_chart
from lamella.lab.report.heatmap import BANDS, routing_view
from lamella.lab.report.pages import page_environment
from lamella.lab.report.tables import Table, frame_table, settings_sections
from lamella.statistics import SIGNIFICANT

if TYPE_CHECKING:
    from lamella.lab.probing.model import ProbedModel
    from lamella.lab.probing.picks import Picks
    from lamella.lab.probing.probe import Probed

_ACROSS = "layer (-1: embeddings)"


def write_probing(probed: ProbedModel, path: Path) -> Path:
    """Writes the page, whole or not at all; returns its path."""
    write_atomic(path, render_probing(probed))
    return path


def render_probing(probed: ProbedModel) -> str:
    """The whole page: nothing loaded from elsewhere, every text escaped, no script."""
    picks = probed.picks
    return (
        page_environment()
        .get_template("probing.html.j2")
        .render(
            title=f"What the layers of {probed.model} hold",
            summary=probing_sentences(probed),
            charts=[_together(probed.results), *map(_layers, probed.properties)],
            asked=_asked(probed.properties),
            results=_results(probed.results),
            picks=picks,
            picked=None if picks is None else _picked(picks),
            routing=None if picks is None else routing_view(picks.trace),
            bands=BANDS,
            correlations=None if probed.correlations is None else _correlations(probed.correlations),
            notes=probed.notes,
            sections=settings_sections(probed.settings),
        )
    )


def probing_sentences(probed: ProbedModel) -> list[str]:
    """What was found: a sentence for each property, and for the picks."""
    return [*map(_best, probed.properties), *_followed(probed)]


def _best(of: Probed) -> str:
    row = of.table.set_index("layer").loc[of.best]
    found = (
        f"{of.of.name.capitalize()} ({of.of.kind}) is most selective behind {_layer_names([of.best])}: accuracy "
        f"{row['accuracy']:.3f} (floor {row['floor']:.3f}), {row['selectivity']:+.3f} [{row['selectivity_low']:+.3f}, "
        f"{row['selectivity_high']:+.3f}] over its control."
    )
    if row["selectivity_low"] <= 0:
        found += " That is no more than the probe reaches on its control."
    rho, low, high = of.trend
    if low > 0 or high < 0:
        found += (
            f" It {'grows' if rho > 0 else 'falls'} with depth, rank correlation {rho:+.2f} [{low:+.2f}, {high:+.2f}]."
        )
    alike = sorted(int(one.second) for one in of.beside_the_best() if not one.significant)
    return f"{found} Not told apart from it: {_layer_names(alike)}." if alike else found


def _layer_names(layers: Sequence[int]) -> str:
    """Layers in words, the embeddings first."""
    blocks = ", ".join(str(layer) for layer in layers if layer >= 0)
    named = ["the embeddings"] * (-1 in layers) + [f"layer{'s' if ',' in blocks else ''} {blocks}"] * bool(blocks)
    return " and ".join(named)


def _followed(probed: ProbedModel) -> list[str]:
    picks, table = probed.picks, probed.correlations
    if picks is None or table is None:
        return []
    share = picks.by_layer
    asked = table[table["measure"] == "selectivity"]
    told = "; ".join(
        f"{row.property} {row.rho:+.2f} [{row.low:+.2f}, {row.high:+.2f}] (p {row.p:.2g})" for row in asked.itertuples()
    )
    follows = ", ".join(asked[asked["p_holm"] < SIGNIFICANT]["property"])
    verdict = (
        f"more than random picks do, after Holm's correction: {follows}"
        if follows
        else "no property more than random picks do, after Holm's correction"
    )
    return [
        f"{picks.called} picked layer {share.argmax()} most, in {share.max():.0%} of the choices "
        f"where an even share is {1 / len(share):.0%}, and the block's own layer in {picks.itself:.0%}. Rank "
        f"correlation of how often a layer is picked with its selectivity: {told}. The picks follow {verdict}."
    ]


def _together(results: pd.DataFrame) -> Chart | None:
    frame = results.rename(columns={"layer": _ACROSS})
    return line_chart(frame, "property", _ACROSS, "selectivity", "Selectivity of all properties", [0.0])


def _layers(one: Probed) -> Chart | None:
    """Accuracy, control, selectivity and floor by layer; whiskers of what is compared."""
    table = one.table.assign(floor_low=one.of.floor, floor_high=one.of.floor)
    lines = [
        pd.DataFrame(
            {
                "line": name,
                _ACROSS: table["layer"],
                "value": table[name],
                "low": table[f"{name}_low"],
                "high": table[f"{name}_high"],
            }
        )
        for name in ("accuracy", "selectivity", "control", "floor")
    ]
    title = f"{one.of.name.capitalize()} ({one.of.kind}): {one.of.question}"
    return line_chart(pd.concat(lines), "line", _ACROSS, "value", title, [0.0, 1.0], ("low", "high"))


def _asked(properties: Sequence[Probed]) -> Table:
    """What each property asks, of how many rows."""
    rows = [
        {
            "property": one.of.name,
            "kind": one.of.kind,
            "asked": one.of.question,
            "classes": len(one.of.classes),
            **{part: len(at) for part, at in one.of.parts.items()},
        }
        for one in properties
    ]
    return frame_table(pd.DataFrame(rows), "What is asked of a sentence, and of how many", "none", first="property")


def _results(results: pd.DataFrame) -> Table:
    shown = pd.DataFrame(
        {
            "property": results["property"],
            "kind": results["kind"],
            "layer": ["embeddings" if layer < 0 else str(layer) for layer in results["layer"]],
            "accuracy": results["accuracy"],
            "floor": results["floor"],
            "control": results["control"],
            "selectivity": results["selectivity"],
            "95 % interval": list(zip(results["selectivity_low"], results["selectivity_high"], strict=True)),
        }
    )
    return frame_table(shown, "Every property behind every layer, means of three seeds", "none", first="property")


def _picked(picks: Picks) -> Chart | None:
    blocks = range(len(picks.by_layer))
    even = picks.allowed / picks.allowed.sum(axis=1, keepdims=True)
    lines = {"picked": picks.by_layer, "even picks": even.mean(axis=0)}
    frame = pd.concat(pd.DataFrame({"line": name, "layer": blocks, "share": one}) for name, one in lines.items())
    return line_chart(frame, "line", "layer", "share", "Share of choices by the layer that is picked", [0.0])


def _correlations(table: pd.DataFrame) -> Table:
    shown = pd.DataFrame(
        {
            "property": table["property"],
            "of": table["measure"],
            "rank correlation": table["rho"],
            "95 % interval": list(zip(table["low"], table["high"], strict=True)),
            "random picks, 95 %": list(zip(table["random_low"], table["random_high"], strict=True)),
            "p": table["p"],
            "p, Holm": table["p_holm"],
        }
    )
    caption = "Rank correlation over the layers of how often one is picked with what is read behind it"
    return frame_table(shown, caption, "not defined", first="property")
