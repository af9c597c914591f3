"""`lamella similarity compress`: fewer experts, and tokens whose expert is gone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.cli.output import console, print_json
from lamella.cli.similarity.subject import Json
from lamella.errors import LamellaError

if TYPE_CHECKING:
    import pandas as pd

    from lamella.cli.similarity.subject import Opened
    from lamella.similarity.compression.grouping import Aligners
    from lamella.similarity.compression.perplexity import Domains
    from lamella.similarity.screening.pairs import Name
    from lamella.similarity.study import StudyFolder

_FOLDED = ("linear", "low-rank")  # kinds of aligner that can be written into an expert's own matrices


def compress(
    study: Annotated[Path, typer.Argument(help="Folder of a study with an alignment.")],
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Share of the experts' parameters to keep; .97, .94, .875, .75, .5 if absent."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="similarity, random, usage or weight-distance; all if absent.")
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="What similarity goes by: identity_nmse, nmse, cka_distance or weight_distance; the first if absent, "
            "nmse behind aligners. May be repeated."
        ),
    ] = None,
    aligner: Annotated[
        str | None,
        typer.Option(
            help="Kind of aligner before stand-ins, one that was aligned: in rerouting and, with --replace, in the "
            "curve. If absent: linear or low-rank in rerouting, none in the curve."
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Domains to measure on; the captured one if absent. May be repeated.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of those texts.")] = "test",
    documents: Annotated[int, typer.Option(min=2, help="Of each text, at most.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Of random merging.")] = 3,
    replace: Annotated[
        bool, typer.Option("--replace", help="Stand-ins as they are, instead of merged experts.")
    ] = False,
    across_layers: Annotated[bool, typer.Option("--across-layers", help="One pool over neighbouring layers.")] = False,
    close: Annotated[int, typer.Option(min=0, help="Experts of each layer to close for rerouting; 0 for none.")] = 1,
    capacity: Annotated[
        int | None,
        typer.Option(min=0, help="Reroute also when closed experts take this many tokens of a sequence and no more."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="New folder for the model at the first budget, by the first method.")
    ] = None,
    json: Json = False,
) -> None:
    """Merge experts to a budget, beside random, usage-based and weight-distance merging; reroute tokens of closed ones.

    The model that --save writes is opened by lamella.similarity.Compressed.load.

    Example: lamella similarity compress studies/tiny --budget 0.9 --budget 0.75 --text news --text dialogue
    """
    import pandas as pd

    from lamella.cli.similarity.subject import open_study
    from lamella.similarity import compress as compressed
    from lamella.similarity import compression_curve, find_routes, largest_compression
    from lamella.similarity.compression import METHODS
    from lamella.similarity.compression.merging import check_arguments
    from lamella.similarity.compression.saving import refuse_existing

    if save is not None:
        refuse_existing(save)
    budgets, methods = budget or [0.97, 0.94, 0.875, 0.75, 0.5], method or METHODS
    for way in methods:
        check_arguments(budgets, way, merge=not replace, aligner=None)
    opened = open_study(study)
    capture = opened.capture
    behind = _aligners(opened, aligner, _kind(aligner)) if replace and aligner else None
    measures = measure or ["nmse"]
    tables = {one: _similarities(opened.folder, one, aligner) for one in measures}
    closed = _most_used(opened, close)
    if closed:  # an expert that nobody could stand in for is named now, not after the curve
        find_routes(_alignment(opened.folder, aligner), opened.model, closed)
    names = text or [opened.subject.text]
    domains = {name: list(opened.texts(name, split, documents)) for name in names}
    curves = []
    with console.status("compressing") as status:
        for named, way, one in _ways(methods, measures):
            curve = compression_curve(
                opened.model, tables[one], domains, budgets, (way,),  # type: ignore[arg-type]
                seeds=range(seeds), capture=capture, merge=not replace, aligner=behind, across_layers=across_layers,
                measure=one,
                progress=lambda done, total, named=named: status.update(f"{named}: {done} of {total}"),  # type: ignore[misc]
            )  # fmt: skip
            curves.append(curve.assign(method=named))
        curve = pd.concat(curves, ignore_index=True)
        opened.folder.write("compression", curve)
        if closed:
            status.update("rerouting")
            _reroute(opened, domains, closed, aligner, capacity)
    if save is not None:
        compressed(
            opened.model, tables[measures[0]], budgets[0], method=methods[0], merge=not replace,  # type: ignore[arg-type]
            aligner=behind if methods[0] == "similarity" else None,
            across_layers=across_layers, measure=measures[0], capture=capture,
        ).save(save, opened.tokenizer)  # fmt: skip
    _show(largest_compression(curve, within=0.01), study / "compression.parquet", json)


def _show(largest: pd.DataFrame, path: Path, json: bool) -> None:
    rows = largest.to_dict("records")
    if json:
        print_json({"table": str(path), "within 1 %": rows})
        return
    for row in rows:
        tried = f"{row['largest']:.0%}, the most tried"
        removed = f"at least {tried}," if row["removed"] == row["largest"] else f"{row['removed']:.0%}"
        perhaps = f"perhaps more than {tried}" if math.isnan(row["high"]) else f"perhaps {row['high']:.0%}"
        typer.echo(
            f"{row['method']} on {row['domain']}: {removed} of the experts' parameters can go before perplexity rises "
            f"by 1 % (surely {row['low']:.0%}, {perhaps})"
        )
    typer.echo(f"Table: {path}")


def _ways(methods: Sequence[str], measures: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Name, method and measure of each curve: similarity goes by every measure, the others by none that matters."""
    for method in methods:
        if method != "similarity" or len(measures) == 1:
            yield method, method, measures[0]
        else:
            yield from ((f"similarity ({measure})", method, measure) for measure in measures)


def _similarities(folder: StudyFolder, measure: str, aligner: str | None) -> pd.DataFrame:
    """The table that has the measure: the screen, its unmeasured pairs left out, or the alignment.

    Raises:
        LamellaError: neither has it.
    """
    from lamella.similarity.compression.grouping import choose_measure

    screened = folder.table("screen")
    if screened is not None and measure in screened.columns:
        return screened.dropna(subset=[measure])
    alignment = _alignment(folder, aligner)
    choose_measure(alignment, measure, aligned=False)
    return alignment


def _alignment(folder: StudyFolder, aligner: str | None) -> pd.DataFrame:
    """The alignment's rows of one aligner: the one asked for, the first that can be folded, or the first.

    Raises:
        LamellaError: nothing was aligned, or not with the kind asked for.
    """
    alignment = folder.needed("alignment", "align")
    arms = [str(arm) for arm in alignment["aligner"].unique()]
    if aligner is not None and aligner not in arms:
        raise LamellaError(
            f"The alignment in {folder.path} has no aligner {aligner!r}, it has {'; '.join(arms)}. Name one of those, "
            f"or run `lamella similarity align {folder.path} --aligner {_kind(aligner)}`."
        )
    arm = aligner or next((one for one in arms if _kind(one) in _FOLDED), arms[0])
    return alignment[alignment["aligner"] == arm]


def _kind(arm: str) -> str:
    """The kind of an aligner, whatever text it was scored on."""
    return arm.partition(",")[0]


def _aligners(opened: Opened, arm: str, kind: str) -> Aligners:
    """Trains aligners of a kind with the settings of an arm of the alignment."""
    from lamella.cli.similarity.arms import noted_arms
    from lamella.similarity import fit_aligners

    noted = noted_arms(opened.folder).get(arm, {})
    settings = {name: noted[name] for name in ("steps", "lr", "pull") if name in noted}
    return partial(fit_aligners, opened.capture, opened.model, aligner=kind, **settings)


def _most_used(opened: Opened, close: int) -> list[Name]:
    """The experts of each layer that most tokens go to, whose work is worth most."""
    routing = opened.capture.routing.sort_values(["layer", "share"], ascending=[True, False])
    chosen = routing.groupby("layer").head(close)
    return [(int(layer), int(expert)) for layer, expert in zip(chosen["layer"], chosen["expert"], strict=True)]


def _reroute(opened: Opened, domains: Domains, closed: list[Name], aligner: str | None, capacity: int | None) -> None:
    """Closes experts; where no aligner that can be folded was aligned, linear ones go before the most similar as is."""
    import pandas as pd

    from lamella.similarity import rerouting_table

    similarity = _alignment(opened.folder, aligner)
    arm = str(similarity["aligner"].iloc[0])
    kind = _kind(arm) if aligner or _kind(arm) in _FOLDED else _FOLDED[0]
    train = _aligners(opened, arm, kind)
    tables = [
        rerouting_table(
            opened.model, similarity, closed, domains, what=what, capacity=capacity if what == "full" else None,  # type: ignore[arg-type]
            across_layers=across, aligner=train, measure="nmse" if kind == _kind(arm) else "identity_nmse",
        ).assign(reach="any layer" if across else "own layer")
        for what in ("dropped", "masked", *([] if capacity is None else ["full"]))
        for across in ((False, True) if _has_neighbours(similarity, closed) else (True,))
    ]  # fmt: skip
    rows = pd.concat(tables, ignore_index=True)
    opened.folder.write("rerouting", rows[rows["how"] != "none"])


def _has_neighbours(similarity: pd.DataFrame, closed: list[Name]) -> bool:
    """Whether each closed expert was aligned with one of its layer that stays: not where only some pairs were."""
    pairs = similarity[similarity["kind"] == "pair"]
    near = pairs[pairs["source_layer"] == pairs["target_layer"]]
    names = zip(near["source_layer"], near["source_expert"], near["target_expert"], strict=True)
    return set(closed) <= {(layer, source) for layer, source, target in names if (layer, target) not in closed}
