"""`lamella similarity compress`: fewer experts, and tokens whose expert is gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.cli.output import console, print_json
from lamella.cli.similarity.subject import Json

if TYPE_CHECKING:
    import pandas as pd

    from lamella.cli.similarity.subject import Opened
    from lamella.similarity.compress.perplexity import Domains
    from lamella.similarity.study import StudyFolder


def compress(
    study: Annotated[Path, typer.Argument(help="Folder of a study with an alignment.")],
    budget: Annotated[
        list[float] | None, typer.Option(help="Share of the experts' parameters to keep; may be repeated.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="similarity, random, usage or weight-distance; all if absent.")
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="What similarity goes by: identity_nmse, nmse, cka_distance or weight_distance. May be repeated."
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
    save: Annotated[
        Path | None, typer.Option(help="Folder for the model at the first budget, by the first method.")
    ] = None,
    json: Json = False,
) -> None:
    """Merge experts to a budget, beside random, usage-based and weight-distance merging; reroute tokens of closed ones.

    Example: lamella similarity compress studies/tiny --budget 0.9 --budget 0.75 --text news --text dialogue
    """
    import pandas as pd

    from lamella.cli.similarity.subject import open_study
    from lamella.similarity import compress as compressed
    from lamella.similarity import compression_curve, largest_compression
    from lamella.similarity.compress import METHODS

    opened = open_study(study)
    capture = opened.capture
    budgets = budget or [0.97, 0.94, 0.875, 0.75, 0.5]
    measures = measure or ["identity_nmse"]
    tables = {one: _similarities(opened.folder, one) for one in measures}
    names = text or [opened.subject.text]
    domains = {name: list(opened.texts(name, split, documents)) for name in names}
    curves = []
    with console.status("compressing") as status:
        for named, way, one in _ways(method or METHODS, measures):
            curve = compression_curve(
                opened.model, tables[one], domains, budgets, (way,),  # type: ignore[arg-type]
                seeds=range(seeds), capture=capture, merge=not replace, across_layers=across_layers, measure=one,
                progress=lambda done, total, named=named: status.update(f"{named}: {done} of {total}"),  # type: ignore[misc]
            )  # fmt: skip
            curves.append(curve.assign(method=named))
        curve = pd.concat(curves, ignore_index=True)
        opened.folder.write("compression", curve)
        if close:
            status.update("rerouting")
            _reroute(opened, domains, close)
    if save is not None:
        compressed(
            opened.model, tables[measures[0]], budgets[0], method=(method or METHODS)[0], merge=not replace,  # type: ignore[arg-type]
            across_layers=across_layers, measure=measures[0], capture=capture,
        ).save(save)  # fmt: skip
    largest = largest_compression(curve, within=0.01)
    if json:
        print_json({"table": str(study / "compression.parquet"), "within 1 %": largest.to_dict("records")})
        return
    for row in largest.to_dict("records"):
        typer.echo(
            f"{row['method']} on {row['domain']}: {row['removed']:.0%} of the experts' parameters can go before "
            f"perplexity rises by 1 % (surely {row['low']:.0%}; more than {row['high']:.0%} is surely too much; "
            f"{row['largest']:.0%} was the most tried)"
        )
    typer.echo(f"Table: {study / 'compression.parquet'}")


def _ways(methods: Sequence[str], measures: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Name, method and measure of each curve: similarity goes by every measure, the others by none that matters."""
    for method in methods:
        if method != "similarity" or len(measures) == 1:
            yield method, method, measures[0]
        else:
            yield from ((f"similarity ({measure})", method, measure) for measure in measures)


def _similarities(folder: StudyFolder, measure: str) -> pd.DataFrame:
    """The table that has the measure: the screen, its unmeasured pairs left out, or the alignment."""
    screened = folder.table("screen")
    if screened is not None and measure in screened.columns:
        return screened.dropna(subset=[measure])
    return folder.needed("alignment", "align")


def _reroute(opened: Opened, domains: Domains, close: int) -> None:
    """Closes the most used experts of each layer, whose tokens are worth most."""
    import pandas as pd

    from lamella.similarity import fit_aligners, rerouting_table

    capture = opened.capture
    similarity = opened.folder.needed("alignment", "align")
    routing = capture.routing.sort_values(["layer", "share"], ascending=[True, False])
    chosen = routing.groupby("layer").head(close)
    closed = [(int(layer), int(expert)) for layer, expert in zip(chosen["layer"], chosen["expert"], strict=True)]
    tables = [
        rerouting_table(
            opened.model, similarity, closed, domains, what=what, across_layers=across,
            aligner=partial(fit_aligners, capture, opened.model),
        ).assign(reach="any layer" if across else "own layer")
        for what in ("dropped", "masked")
        for across in ((False, True) if _has_neighbours(similarity, closed) else (True,))
    ]  # fmt: skip
    rows = pd.concat(tables, ignore_index=True)
    opened.folder.write("rerouting", rows[rows["how"] != "none"])


def _has_neighbours(similarity: pd.DataFrame, closed: list[tuple[int, int]]) -> bool:
    """Whether each closed expert was aligned with one of its layer that stays: not where only some pairs were."""
    pairs = similarity[similarity["kind"] == "pair"]
    near = pairs[pairs["source_layer"] == pairs["target_layer"]]
    names = zip(near["source_layer"], near["source_expert"], near["target_expert"], strict=True)
    return set(closed) <= {(layer, source) for layer, source, target in names if (layer, target) not in closed}
