"""The steps of a study: each reads what those before it left in the folder, and writes its tables there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast, get_args

import torch

from lamella.aligners import KINDS
from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError, optional_module
from lamella.progress import working
from lamella.similarity.activations import Capture, TextBatches, capture
from lamella.similarity.activations.norms import distributions
from lamella.similarity.alignment import fit_aligners, sweep
from lamella.similarity.alignment.table import by_aligner, from_label
from lamella.similarity.compression import Settings, compression_curve, damages, find_routes, rerouting_table
from lamella.similarity.compression.compressed import check_arguments, compress_each, rank_experts
from lamella.similarity.compression.perplexity import SETTINGS, Domains, read_domains
from lamella.similarity.compression.routes import Aligners
from lamella.similarity.compression.saving import refuse_existing
from lamella.similarity.pairs import Name
from lamella.similarity.screening import all_pairs, choose_pairs, screen
from lamella.similarity.study import Study, StudyFolder
from lamella.similarity.swapping import (
    Metric,
    Swap,
    Unit,
    control_swaps,
    expert_pairs,
    layer_pairs,
    routing_shift,
    swap_effects,
)
from lamella.similarity.swapping.scores import Batch

if TYPE_CHECKING:
    import pandas as pd

P = ParamSpec("P")
R = TypeVar("R")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FOLDED = ("linear", "low-rank")  # kinds of aligner that can be written into an expert's own matrices
_SHIFTS = ["swap", "layer", "expert", "share_before", "share_after", "dropped_before", "dropped_after"]


def sample_dtype(name: str) -> torch.dtype:
    """The precision of samples by its name.

    Raises:
        LamellaError: samples have no such precision.
    """
    if name not in _DTYPES:
        raise LamellaError(f"samples={name!r}: samples are kept as {' or '.join(_DTYPES)}.")
    return _DTYPES[name]


def _alone(step: Callable[Concatenate[Study, P], R]) -> Callable[Concatenate[Study, P], R]:
    """Lets one process at a time take this step of a study, as the rows of two would replace each other."""

    @wraps(step)
    def taken(study: Study, /, *args: P.args, **settings: P.kwargs) -> R:
        with study.folder.alone(step.__name__):
            return step(study, *args, **settings)

    return taken


def capture_texts(
    study: Study,
    texts: TextBatches,
    per_expert: int,
    seed: int,
    dtype: torch.dtype,
    whole_text: bool = False,
) -> Capture:
    """Begins the study, or goes on with it: the capture, its tables, and how inputs and outputs are distributed."""
    study.folder.begin(study.subject)
    truth = Path(study.subject.model) / "ground_truth.json"
    if truth.is_file():  # a model that was made so that it is known which experts are alike
        study.folder.note("ground_truth", json.loads(truth.read_text(encoding="utf-8")))
    taken = capture(
        study.model, texts.shuffled(seed), study.folder.capture, per_expert, seed=seed, dtype=dtype,
        tokenizer=study.tokenizer, origin=texts.origin, whole_text=whole_text,
    )  # fmt: skip
    taken.write_tables()
    norms, plane = distributions(taken, study.model)
    study.folder.write("histogram", norms)
    study.folder.write("plane", plane)
    return taken


@_alone
def screen_pairs(study: Study, measures: Sequence[str]) -> pd.DataFrame:
    """Screens all ordered pairs."""
    table = screen(study.capture, study.model, measures=measures)
    study.folder.write("screen", table)
    return table


@_alone
def align_pairs(
    study: Study,
    kinds: Sequence[str],
    seeds: int,
    load: Callable[[str, str], Any],
    *,
    steps: int,
    lr: float,
    pull: str | None = None,
    per_source: int | None = None,
    same_layer: bool = False,
    score_on: Path | None = None,
    ray: str | None = None,
    device: str = "cpu",
) -> list[str]:
    """Aligns all pairs, or those that the screen lets through, with each kind and seed; gives the notes.

    The table keeps what was aligned before with other aligners, seeds and texts to score on. An aligner with other
    settings takes the place of its rows.
    """
    other = None if score_on is None else StudyFolder(score_on)
    elsewhere = None if other is None else other.captured()
    pairs = None if per_source is None else choose_pairs(study.folder.needed("screen", "screen"), per_source)
    if same_layer:
        pairs = pairs or all_pairs(study.capture.experts)
        pairs = [(source, target) for source, target in pairs if source[0] == target[0]]
    trained: dict[str, Any] = {"steps": steps, "lr": lr, "pull": pull}
    drawn = [(kind, seed) for kind in kinds for seed in range(seeds)]
    tables = []
    for at, (kind, seed) in enumerate(drawn, start=1):
        with working(f"{kind}, seed {seed} ({at} of {len(drawn)})"):
            table = sweep(
                study.capture, study.subject.model, study.folder.path, pairs, ray=ray, score_on=elsewhere, load=load,
                dtype=study.subject.dtype, device=device, aligner=kind, seed=seed, **trained,
            )  # fmt: skip
        tables.append(table.assign(scored_on="" if other is None else _text_of(other)))
    settings = {
        **trained,
        "per_source": per_source,
        "same_layer": same_layer,
        "score_on": None if elsewhere is None else elsewhere.manifest.identity,
    }
    return _add_alignments(study.folder, tables, settings)


def _text_of(study: StudyFolder) -> str:
    subject = study.subject()
    return f"{Path(subject.text).name} ({subject.split})"


def _add_alignments(folder: StudyFolder, tables: Sequence[pd.DataFrame], settings: dict[str, Any]) -> list[str]:
    """Writes alignments, one a seed, beside those of other aligners, texts and seeds; gives their notes.

    Rows of the same aligner and text with other settings, and of another capture, go.
    """
    pd = optional_module("pandas", "A table of aligned pairs")
    rows = pd.concat(tables, ignore_index=True)
    notes: dict[tuple[str, str], set[str]] = {name: set() for name in _aligned(rows)}
    for table in tables:
        notes[_aligned(table)[0]].update(table.attrs.get("notes", []))
    noted = {(one["aligner"], one["scored_on"]): one for one in folder.aligned()}
    before = None if folder.is_stale("alignment") else folder.table("alignment")
    others = []
    if before is not None:
        others = [one for name, one in noted.items() if name not in notes]
        changed = {name for name in notes if not settings.items() <= noted.get(name, {}).items()}
        kept = before[[name not in changed for name in _aligned(before)]]
        rows = pd.concat([_lacking(kept, rows, ["aligner", "scored_on", "seed"]), rows], ignore_index=True)
    mine = [
        {"aligner": aligner, "scored_on": scored_on, **settings, "notes": sorted(said)}
        for (aligner, scored_on), said in notes.items()
    ]
    # between the two notes a kill leaves alignments of unknown settings, which the next run replaces
    folder.note("alignment", {"aligners": others})
    folder.write("alignment", _in_order(rows))
    folder.note("alignment", {"aligners": [*others, *mine]})
    return sorted(set().union(*notes.values()))


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Scored on the captured text first, then by aligner as they are listed, then by seed: whatever ran first."""
    return table.sort_values(
        ["scored_on", "aligner", "seed"], kind="stable", ignore_index=True,
        key=lambda column: column.map(KINDS.index) if column.name == "aligner" else column,
    )  # fmt: skip


def _aligned(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Of each row the aligner, and the text that it was scored on."""
    return list(zip(table["aligner"], table["scored_on"], strict=True))


@_alone
def swap_parts(
    study: Study,
    texts: TextBatches,
    units: Sequence[str],
    layers: str | None,
    one_way: bool,
    metric: str,
) -> pd.DataFrame:
    """Swaps units and measures; the table holds swaps measured before too. Also what the routers choose after them."""
    if unknown := [one for one in units if one not in get_args(Unit)]:
        raise LamellaError(f"unit={unknown[0]!r} is not one of {', '.join(get_args(Unit))}.")
    if metric not in get_args(Metric):
        raise LamellaError(f"metric={metric!r} is not one of {', '.join(get_args(Metric))}.")
    if metric == "accuracy" and texts.writes and not texts.label_tokens:
        raise LamellaError(
            f"{study.subject.model} writes its answers, and its tokenizer has no token <|NAME|> for every label of "
            "the text, so its accuracy cannot be told. Measure with --metric nll."
        )
    batches = list(texts)
    for unit in cast(Sequence[Unit], units):
        swap_effects(
            study.model, batches, _swaps(study, unit, layers, one_way), unit, not one_way, cast(Metric, metric),
            folder=study.folder.path, choices=texts.label_tokens or None,
        )  # fmt: skip
    table = study.folder.needed("swap", "swap")
    study.folder.write("shifts", _shifts(study, table, batches))
    return table


def _swaps(study: Study, unit: Unit, layers: str | None, one_way: bool) -> list[Swap]:
    if unit != "expert":
        pairs = layer_pairs(study.model, unit, ordered=one_way)
        return [*pairs, *control_swaps(pairs)]
    indices = [layer.index for layer in moe_layers(study.model)]
    named = [str(indices[0]), str(indices[-1])] if layers is None else [part.strip() for part in layers.split(",")]
    if len(named) != 2 or not all(part.isdecimal() for part in named):
        raise LamellaError(
            f"layers={layers!r} names no two layers; write two indices, such as {indices[0]},{indices[-1]}."
        )
    pairs = expert_pairs(study.model, *map(int, named))
    back = [(second, first) for first, second in pairs] if one_way else []
    return [*pairs, *back, *control_swaps(pairs)]


def _shifts(study: Study, table: pd.DataFrame, batches: list[Any]) -> pd.DataFrame:
    """Routing before and after the nearest and the farthest swap of each unit of whole layers, as it was measured."""
    pd = optional_module("pandas", "A table of routing")
    frames = []
    of_layers = table[(table["unit"] != "expert") & (table["distance"] > 0)]
    for (unit, exchange), rows in of_layers.groupby(["unit", "exchange"]):
        for at in dict.fromkeys((rows["distance"].idxmin(), rows["distance"].idxmax())):
            first, second = int(rows.loc[at, "first_layer"]), int(rows.loc[at, "second_layer"])
            shift = routing_shift(study.model, batches, first, second, unit, bool(exchange))
            named = f"{unit} {first} and {second}" if exchange else f"{unit} {second} in the place of {first}"
            frames.append(shift.assign(swap=named))
    return pd.concat(frames, ignore_index=True)[_SHIFTS] if frames else pd.DataFrame(columns=_SHIFTS)


@_alone
def compress_to_budgets(
    study: Study,
    domains: Domains,
    texts: Sequence[Batch],
    budgets: Sequence[float],
    criteria: Sequence[str],
    settings: Settings,
    *,
    aligner: str | None = None,
    seeds: int = 3,
    close: int = 1,
    capacity: int | None = None,
    save: Path | None = None,
    measured_on: str = "",
) -> tuple[pd.DataFrame, list[str]]:
    """Perplexity after compression by each criterion to each budget, and after rerouting the tokens of closed experts.

    What can be refused is refused before the model reads any text. Rows of an earlier compression stay in the table
    beside the new ones, each of which is written when it is measured; those of the same settings are not measured
    again. Rerouting needs an alignment, and is left out where none is.

    Args:
        study: with a capture.
        domains: texts to measure on, by name.
        texts: batches of the captured text, for layer gradients and distillation.
        budgets, criteria: of ``compress``.
        settings: of ``compress``, the same for all criteria.
        aligner: that was aligned, before replacements in rerouting; None takes one that can be folded.
        seeds: of the criterion "random".
        close: experts of each layer whose tokens are rerouted, those that go first.
        capacity: also reroute where closed experts take so many tokens of a sequence.
        save: new folder for the model at the first budget by the first criterion.
        measured_on: what part of the texts, in words.

    Returns:
        The curve of this call, and notes on what it replaced and left out.
    """
    if save is not None:
        refuse_existing(save)
    for name in criteria:
        check_arguments(budgets, replace(settings, criterion=name), texts)
    closed: list[Name] = []
    if close and study.folder.table("alignment") is not None:
        closed = _first_to_go(study, criteria[0], aligner, close)
        find_routes(_rows_of(study.folder, aligner), study.model, closed)  # one that none could replace is named now
    refused: list[str] = []
    settings = settings.with_passes(texts)
    before, notes = _curve_before(study.folder)
    known = None if before is None else before[before["measured_on"] == measured_on]

    def keep(rows: pd.DataFrame) -> None:
        _keep_curve(study.folder, before, rows.assign(measured_on=measured_on))

    curve = compression_curve(
        study.model, study.capture, read_domains(domains), budgets, criteria, seeds=range(seeds), texts=texts,
        chosen_on=(study.subject.text,), settings=settings, refused=refused.append, known=known, keep=keep,
    )  # fmt: skip
    keep(curve)
    notes = refused + notes
    if closed:
        with working("rerouting"):
            notes += _reroute(study, read_domains(domains), closed, aligner, capacity)
    elif close:
        notes.append("Nothing was aligned, so no tokens were rerouted.")
    if save is not None:
        first = replace(settings, criterion=criteria[0])
        next(compress_each(study.model, study.capture, budgets[:1], first, texts)).save(save, study.tokenizer)
    return curve, notes


@_alone
def measure_damages(study: Study) -> pd.DataFrame:
    """What it costs to give a token to another expert of its layer, by which ``reroute`` serves."""
    table = damages(study.capture, study.model)
    study.folder.write("damages", table)
    return table


def _curve_before(folder: StudyFolder) -> tuple[pd.DataFrame | None, list[str]]:
    """The rows of earlier compressions with their settings; where nothing says those, a note that they go."""
    before = None if folder.is_stale("compression") else folder.table("compression")
    if before is None or "measured_on" in before.columns:
        return before, []
    noted = folder.facts("compression")  # where earlier editions had the settings of all rows
    if noted is None:
        return None, [f"{len(before)} rows of an earlier compression, of unknown settings, are replaced."]
    return before.assign(weighted=True, **noted), []


def _keep_curve(folder: StudyFolder, before: pd.DataFrame | None, rows: pd.DataFrame) -> None:
    """Writes what is measured so far beside the rows of before."""
    pd = optional_module("pandas", "A compression curve")
    if before is not None:
        key = ["method", "budget", "domain", "seed", *SETTINGS]
        rows = pd.concat([_lacking(before, rows, key), rows], ignore_index=True)
    folder.write("compression", rows)


def _lacking(before: pd.DataFrame, now: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """The rows of an earlier table that a new one has no row for."""
    pd = optional_module("pandas", "A table of a study")
    return before[~pd.MultiIndex.from_frame(before[key]).isin(pd.MultiIndex.from_frame(now[key]))]


def _rows_of(folder: StudyFolder, aligner: str | None) -> pd.DataFrame:
    """The alignment's rows of one aligner: the one asked for, the first that can be folded, or the first.

    Raises:
        LamellaError: nothing was aligned, or not with the kind asked for.
    """
    tables = by_aligner(folder.needed("alignment", "align"))
    if aligner is not None and aligner not in tables:
        raise LamellaError(
            f"The alignment in {folder.path} has no aligner {aligner!r}, it has {'; '.join(tables)}. Name one of "
            f"those, or run `lamella similarity align {folder.path} --aligner {from_label(aligner)[0]}`."
        )
    foldable = (name for name, rows in tables.items() if rows["aligner"].iloc[0] in _FOLDED)
    return tables[aligner or next(foldable, next(iter(tables)))]


def _aligners(study: Study, rows: pd.DataFrame, kind: str | None = None) -> Aligners:
    """Trains aligners with the settings that an alignment was made with, of its kind unless another is given."""
    name = tuple(rows[["aligner", "scored_on"]].iloc[0])
    noted = next((one for one in study.folder.aligned() if (one["aligner"], one["scored_on"]) == name), {})
    settings = {key: noted[key] for key in ("steps", "lr", "pull") if key in noted}
    return partial(fit_aligners, study.capture, study.model, aligner=kind or name[0], **settings)


def _first_to_go(study: Study, criterion: str, aligner: str | None, close: int) -> list[Name]:
    """The experts of each layer that go first, among those for which others were measured."""
    pairs = _rows_of(study.folder, aligner)
    known = set(zip(pairs["source_layer"], pairs["source_expert"], strict=True))
    closed: list[Name] = []
    for layer, ranking in rank_experts(study.model, study.capture, criterion).items():
        order = [(layer, expert) for expert in ranking.order]
        closed += ([name for name in order if name in known] or order)[:close]
    return closed


def _reroute(
    study: Study, domains: Domains, closed: Sequence[Name], aligner: str | None, capacity: int | None
) -> list[str]:
    """Closes experts, and says what of an earlier table goes.

    Where no aligner that can be folded was aligned, linear ones go before the most similar expert as it is.
    """
    pd = optional_module("pandas", "A table of rerouting")
    similarity = _rows_of(study.folder, aligner)
    aligned = str(similarity["aligner"].iloc[0])
    kind = aligned if aligner or aligned in _FOLDED else _FOLDED[0]
    tables = [
        rerouting_table(
            study.model, similarity, closed, domains, what=what, capacity=capacity if what == "full" else None,  # type: ignore[arg-type]
            across_layers=across, aligner=_aligners(study, similarity, kind),
            measure="nmse" if kind == aligned else "identity_nmse",
        ).assign(reach="any layer" if across else "own layer")
        for what in ("dropped", "masked", *([] if capacity is None else ["full"]))
        for across in ((False, True) if _has_neighbours(similarity, closed) else (True,))
    ]  # fmt: skip
    rows = pd.concat(tables, ignore_index=True)
    rows = rows[rows["how"] != "none"]
    before = None if study.folder.is_stale("rerouting") else study.folder.table("rerouting")
    study.folder.write("rerouting", rows)
    lost = 0 if before is None else len(_lacking(before, rows, ["how", "what", "experts", "domain", "reach"]))
    return [f"{lost} rows of an earlier rerouting, of other experts or texts, are replaced."] if lost else []


def _has_neighbours(similarity: pd.DataFrame, closed: Sequence[Name]) -> bool:
    """Whether each closed expert was aligned with one of its layer that stays: not where only some pairs were."""
    pairs = similarity[similarity["kind"] == "pair"]
    near = pairs[pairs["source_layer"] == pairs["target_layer"]]
    names = zip(near["source_layer"], near["source_expert"], near["target_expert"], strict=True)
    return set(closed) <= {(layer, source) for layer, source, target in names if (layer, target) not in closed}
