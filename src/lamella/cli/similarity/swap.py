"""`lamella similarity swap`: what a swap costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from lamella.cli.output import console, print_json
from lamella.cli.similarity.subject import Json

if TYPE_CHECKING:
    import pandas as pd

    from lamella.cli.similarity.subject import Opened

_UNITS = ("expert", "router", "router+experts", "block")


def swap(
    study: Annotated[Path, typer.Argument(help="Folder of a study with a capture.")],
    unit: Annotated[
        list[str] | None, typer.Option(help="expert, router, router+experts or block; may be repeated.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="For experts: two layers, such as 0,2; the first and the last if absent.")
    ] = None,
    one_way: Annotated[
        bool, typer.Option("--one-way", help="The second takes the first's place only, for every pair in both orders.")
    ] = False,
    text: Annotated[str | None, typer.Option(help="To measure on; the captured one's other split if absent.")] = None,
    split: Annotated[str, typer.Option(help="Of that text.")] = "test",
    documents: Annotated[int, typer.Option(min=2, help="To measure on, at most.")] = 64,
    metric: Annotated[str, typer.Option(help="nll (nats per token) or accuracy.")] = "nll",
    json: Json = False,
) -> None:
    """Put experts, routers or blocks in each other's place and measure, with intervals. Goes on where it stopped.

    Example: lamella similarity swap studies/tiny --unit block --unit router+experts
    """
    from lamella.cli.similarity.subject import open_study
    from lamella.errors import LamellaError
    from lamella.similarity.swapping import Metric, change_in_words, distance_regressions, swap_effects

    units = unit or ["router+experts", "block"]
    if unknown := [one for one in units if one not in _UNITS]:
        raise LamellaError(f"unit={unknown[0]!r} is none of {', '.join(_UNITS)}.")
    if metric not in get_args(Metric):
        raise LamellaError(f"metric={metric!r} is none of {', '.join(get_args(Metric))}.")
    opened = open_study(study)
    texts = opened.texts(text, split, documents)
    if metric == "accuracy" and texts.writes and not texts.label_tokens:
        raise LamellaError(
            f"{opened.subject.model} writes its answers, and its tokenizer has no token <|NAME|> for every label of "
            "the text, so its accuracy cannot be told. Measure with --metric nll."
        )
    batches = list(texts)
    with console.status("swapping") as status:
        for one in units:
            swap_effects(
                opened.model, batches, _swaps(opened, one, layers, one_way), one, not one_way, metric,  # type: ignore[arg-type]
                folder=study, choices=texts.label_tokens or None,
                progress=lambda done, total, one=one: status.update(f"{one}: {done} of {total} swaps"),  # type: ignore[misc]
            )  # fmt: skip
    table = opened.folder.needed("swap", "swap")
    regressions = distance_regressions(table)
    opened.folder.write("shifts", _shifts(opened, table, batches))
    if json:
        print_json({"table": str(study / "swap.parquet"), "swaps": len(table), "distance": regressions})
        return
    for name, found in regressions.items():
        typer.echo(
            f"The effect of {name} {change_in_words(found)} with the distance of the layers: {found['slope']:+.4f} per "
            f"layer, rank correlation {found['spearman']:.2f} (p {found['p_value']:.3f})."
        )
    typer.echo(f"{len(table)} swaps. Table: {study / 'swap.parquet'}")


def _swaps(opened: Opened, unit: str, layers: str | None, one_way: bool) -> list[Any]:
    from lamella.backbones.moe import moe_layers
    from lamella.errors import LamellaError
    from lamella.similarity.swapping import control_swaps, expert_pairs, layer_pairs

    if unit != "expert":
        pairs = layer_pairs(opened.model, unit, ordered=one_way)  # type: ignore[arg-type]
        return [*pairs, *control_swaps(pairs)]
    indices = [layer.index for layer in moe_layers(opened.model)]
    named = [str(indices[0]), str(indices[-1])] if layers is None else [part.strip() for part in layers.split(",")]
    if len(named) != 2 or not all(part.isdecimal() for part in named):
        raise LamellaError(
            f"layers={layers!r} names no two layers; write two indices, such as {indices[0]},{indices[-1]}."
        )
    pairs = expert_pairs(opened.model, *map(int, named))
    back = [(second, first) for first, second in pairs] if one_way else []
    return [*pairs, *back, *control_swaps(pairs)]


def _shifts(opened: Opened, table: pd.DataFrame, batches: list[Any]) -> pd.DataFrame:
    """Routing before and after the nearest and the farthest swap of each unit of whole layers, as it was measured."""
    import pandas as pd

    from lamella.similarity.swapping import routing_shift

    frames = []
    whole = table[(table["unit"] != "expert") & (table["distance"] > 0)]
    for (unit, exchange), rows in whole.groupby(["unit", "exchange"]):
        for at in dict.fromkeys((rows["distance"].idxmin(), rows["distance"].idxmax())):
            first, second = int(rows.loc[at, "first_layer"]), int(rows.loc[at, "second_layer"])
            shift = routing_shift(opened.model, batches, first, second, unit, bool(exchange))
            named = f"{unit} {first} and {second}" if exchange else f"{unit} {second} in the place of {first}"
            frames.append(shift.assign(swap=named))
    columns = ["swap", "layer", "expert", "share_before", "share_after", "dropped_before", "dropped_after"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)
