"""`lamella similarity align`: aligners for pairs of experts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamella.cli.output import console, print_json
from lamella.cli.similarity.subject import Json

if TYPE_CHECKING:
    import pandas as pd

    from lamella.similarity.study import StudyFolder


def align(
    study: Annotated[Path, typer.Argument(help="Folder of a study with a capture.")],
    aligner: Annotated[
        list[str] | None, typer.Option(help="layernorm, linear, low-rank or identity; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each aligner; two or more give the seed ceiling.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps of an aligner, at most.")] = 200,
    lr: Annotated[float, typer.Option(help="Step size of Adam.")] = 3e-3,
    per_source: Annotated[
        int | None, typer.Option(min=1, help="Stand-ins of each expert that the screen lets through; all if absent.")
    ] = None,
    same_layer: Annotated[bool, typer.Option("--same-layer", help="Only pairs within a layer.")] = False,
    score_on: Annotated[Path | None, typer.Option(help="Folder of another study: its text is scored on.")] = None,
    pull: Annotated[str | None, typer.Option(help="Towards the stand-in's inputs: mmd or kl.")] = None,
    ray: Annotated[str | None, typer.Option(help="auto, or the address of a Ray cluster; here if absent.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Json = False,
) -> None:
    """Train an aligner for every ordered pair, score it on held-out documents, with controls. Goes on where it stopped.

    The table keeps what other calls aligned: other aligners, seeds and texts to score on. An aligner with other
    settings takes the place of its rows.

    Example: lamella similarity align studies/tiny --aligner layernorm --seeds 2
    """
    from lamella.cli.similarity.arms import arm_name, keep_arms
    from lamella.cli.similarity.subject import open_study
    from lamella.lab.data.models import load_model
    from lamella.similarity import choose_pairs
    from lamella.similarity.alignment import sweep
    from lamella.similarity.screening import all_pairs
    from lamella.similarity.study import StudyFolder

    other = None if score_on is None else StudyFolder(score_on)
    elsewhere = None if other is None else other.captured()
    scored_on = None if other is None else _text_of(other)
    opened = open_study(study)
    folder, capture = opened.folder, opened.capture
    pairs = None if per_source is None else choose_pairs(folder.needed("screen", "screen"), per_source)
    if same_layer:
        pairs = [(source, target) for source, target in pairs or all_pairs(capture.experts) if source[0] == target[0]]
    given: dict[str, Any] = {"steps": steps, "lr": lr, "pull": pull}
    tables = []
    with console.status("aligning") as status:
        for kind in aligner or ["layernorm"]:
            for seed in range(seeds):
                table = sweep(
                    capture, opened.subject.model, folder.path, pairs, ray=ray, score_on=elsewhere,
                    dtype=opened.subject.dtype, device=device, load=load_model, aligner=kind, seed=seed,
                    progress=_telling(status, f"{kind}, seed {seed}"), **given,
                )  # fmt: skip
                table["aligner"] = arm_name(kind, scored_on)
                tables.append(table)
    settings = {
        **given,
        "per_source": per_source,
        "same_layer": same_layer,
        "score_on": None if elsewhere is None else elsewhere.manifest.identity,
    }
    path, notes = keep_arms(folder, tables, settings)
    _show(folder.needed("alignment", "align"), notes, path, json)


def _text_of(other: StudyFolder) -> str:
    """The text of another study, as an arm is named by it."""
    subject = other.subject()
    return f"{Path(subject.text).name} ({subject.split})"


def _telling(status: Any, what: str) -> Any:
    return lambda done, total: status.update(f"{what}: {done} of {total} tiles")


def _show(table: pd.DataFrame, notes: list[str], path: Path, json: bool) -> None:
    from lamella.lab.report.similarity.verdict import NOT_REGAINED, REMEDY
    from lamella.similarity import beyond_controls, seed_ceiling

    pairs = table[table["kind"] == "pair"]
    facts: dict[str, Any] = {"table": str(path), "rows": len(table), "notes": notes, "aligners": {}}
    for kind, rows in pairs.groupby("aligner"):
        own = table[table["aligner"] == kind]
        facts["aligners"][str(kind)] = {
            "median nmse": float(rows["nmse"].median()),
            "self": float(own.loc[own["kind"] == "self", "nmse"].median()),
            "random target": float(own.loc[own["kind"] == "random-target", "nmse"].median()),
            "beyond controls": float(beyond_controls(rows)["beyond"].mean()),
            "seed ceiling": seed_ceiling(own) if own["seed"].nunique() > 1 else None,
        }
    if json:
        print_json(facts)
        return
    for kind, found in facts["aligners"].items():
        ceiling = found["seed ceiling"]
        known = (
            ""
            if ceiling is None or math.isnan(ceiling["overall"])
            else f" One seed ranks pairs as another does with {ceiling['overall']:.2f}."
        )
        if found["self"] > NOT_REGAINED:
            typer.echo(f"{kind}: the aligners hardly learned: not even the expert itself is regained. {REMEDY}")
        typer.echo(
            f"{kind}: {found['median nmse']:.1%} of the variance stays unexplained at the median; itself "
            f"{found['self']:.2%}, a random expert {found['random target']:.1%}; {found['beyond controls']:.0%} of the "
            f"pairs are better than all controls.{known}"
        )
    for note in notes:
        typer.echo(f"Note: {note}")
    typer.echo(f"Table: {path}")
