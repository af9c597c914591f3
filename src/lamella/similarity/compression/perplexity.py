"""Perplexity over the share of experts that is kept, for each method, and how much can go."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError, optional_module
from lamella.progress import working
from lamella.similarity.compression.calibration import layer_gradients
from lamella.similarity.compression.compressed import Compressed, Settings, check_arguments, compress_each, rank_experts
from lamella.similarity.compression.criteria import CRITERIA
from lamella.similarity.compression.rerouting import First, What, drop, next_choice, reroute
from lamella.similarity.compression.routes import Aligners, find_routes
from lamella.similarity.pairs import Name
from lamella.similarity.swapping.scores import Batch, TextScores, text_scores
from lamella.statistics import ratio_interval
from lamella.tracing import Trace, record_routing

if TYPE_CHECKING:
    import pandas as pd

    from lamella.similarity.activations import Capture


COLUMNS = (
    "method", "budget", "parameters", "domain", "perplexity", "baseline", "ratio", "low", "high", "experts_left",
    "seed", "experts", "parameters_before", "bytes", "gone", "chosen_on", "choices_gone", "captured_gone",
    "scope", "weighted", "refit", "distil",
)  # fmt: skip
SETTINGS = ("scope", "weighted", "refit", "distil", "measured_on")  # the last one in the table of a study
_NEEDED = ("method", "budget", "domain", "ratio", "low", "high")
CURVES = (  # criteria that a curve shows where none is named
    "reap", "reconstruction", "stand-in", "merge", "energy", "mean", "mone", "frequency", "man", "hc-smoe", "m-smoe",
    "ream", "aimer", "random",
)  # fmt: skip


def compression_curve(
    model: PreTrainedModel,
    capture: Capture,
    batches_by_domain: Domains,
    budgets: Sequence[float],
    criteria: Sequence[str] = CURVES,
    *,
    seeds: Sequence[int] = (0,),
    texts: Sequence[Batch] | None = None,
    chosen_on: Collection[str] = (),
    settings: Settings | None = None,
    refused: Callable[[str], object] = warnings.warn,
    known: pd.DataFrame | None = None,
    keep: Callable[[pd.DataFrame], object] = lambda rows: None,
) -> pd.DataFrame:
    """Compresses the model by each criterion to each budget and measures what that does to held-out text.

    Args:
        model: left as it is.
        capture, texts: as for ``compress``.
        batches_by_domain: what the model is called with, one document a row, by name of the domain.
        budgets: shares of the experts to keep.
        criteria: of ``compress``.
        seeds: of the criterion "random", one model each; the others have none to draw and are compressed once.
        chosen_on: the domains of the capture's text.
        settings: scope, weights, refit and distillation, the same for all; those of ``compress`` if absent.
        refused: told which criterion cannot reach which budget, and why; the curve goes on with the others.
        known: rows of an earlier call with the same capture. Those of the same settings are not measured again, unless
            the whole model has another perplexity on a domain than it had then: other weights, or another text.
        keep: told all rows as soon as those of another model are measured.

    Returns:
        One row per criterion, budget, seed and domain: method (the criterion), budget, parameters (that the whole
        compressed model stores), domain, perplexity, baseline (perplexity of the model as it is), ratio of the two with
        the 95 % interval low to high (bootstrap over documents, paired), experts_left, seed, experts and
        parameters_before (of the model as it is), bytes (that are saved), gone (the experts that are not stored any
        more, JSON), chosen_on (whether the capture's text is of the domain), choices_gone (the share of the domain's
        choices that the whole model's routers gave to experts that are gone, mean over layers), captured_gone (the
        same of the captured text), and the settings: scope, weighted, refit, distil.

    Raises:
        LamellaError: no budget, criterion or seed, a domain without text, or what ``compress`` refuses for all of them.
    """
    pd = optional_module("pandas", "A compression curve")

    if not (budgets and criteria and seeds):
        raise LamellaError("A compression curve needs at least one budget, one criterion and one seed.")
    shared = (settings or Settings()).with_passes(texts)
    wanted = [
        replace(shared, criterion=name, seed=seed)
        for name in criteria
        for seed in (seeds if name == "random" else seeds[:1])
    ]
    for one in wanted:
        check_arguments(budgets, one, texts)
    domains = read_domains(batches_by_domain)
    before, shares = {}, {}
    for name, batches in domains.items():
        with record_routing(model) as trace:
            before[name] = text_scores(model, batches, "nll")
        shares[name] = _shares(model, trace)
    compared = any(one.compares_layers for one in wanted)
    gradients = layer_gradients(model, moe_layers(model), texts or ()) if compared else None
    errors: list[LamellaError] = []
    models = [(one, budget) for one in wanted for budget in budgets]
    told = {name: getattr(shared, name) for name in ("scope", "weighted", "refit", "distil")}
    found = _known(known, before, told)
    rows = [row for one, budget in models for row in found.get((one.criterion, budget, one.seed), ())]
    todo = [(one, budget) for one, budget in models if (one.criterion, budget, one.seed) not in found]
    with working("measuring smaller models", len(models), "models", done=len(models) - len(todo)) as work:
        for one, of_one in itertools.groupby(todo, key=lambda pair: pair[0]):
            with working(f"ranking experts by {one.criterion}"):
                ranked = rank_experts(model, capture, one.criterion, one.seed)
            for _, budget in of_one:
                try:
                    (small,) = compress_each(model, capture, [budget], one, texts, ranked, gradients)
                except LamellaError as error:
                    errors.append(error)
                    refused(f"{one.criterion} cannot keep {budget:.1%} of the experts. {error}")
                else:
                    gone = {"captured_gone": _gone(small, capture.shares)}
                    rows += [
                        {**row, **told, **gone, "choices_gone": _gone(small, shares[name])}
                        for name, row in _measured(small, before, domains, chosen_on).items()
                    ]
                    keep(pd.DataFrame(rows, columns=list(COLUMNS)))
                work.advance()
    if not rows:
        raise errors[0]
    order = {(one.criterion, budget, one.seed): at for at, (one, budget) in enumerate(models)}
    rows.sort(key=lambda row: order[row["method"], row["budget"], row["seed"]])
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _known(
    table: pd.DataFrame | None, before: Mapping[str, TextScores], settings: Mapping[str, Any]
) -> dict[tuple[str, float, int], list[dict[str, Any]]]:
    """The rows of each model with these settings, by criterion, budget and seed, that was measured on all domains."""
    if table is None:
        return {}
    found: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        is_like = all(row.get(name) == value for name, value in settings.items())
        if is_like and row["domain"] in before and row["baseline"] == before[row["domain"]].perplexity:
            found.setdefault((row["method"], row["budget"], row["seed"]), []).append(row)
    return {model: rows for model, rows in found.items() if len(rows) == len(before)}


def _measured(
    small: Compressed,
    before: Mapping[str, TextScores],
    domains: Mapping[str, Sequence[Batch]],
    chosen_on: Collection[str],
) -> dict[str, dict[str, Any]]:
    """The rows of one compressed model, by domain."""
    report, after = small.report, score(small.model, domains)
    told = {
        "method": report.criterion, "budget": report.budget, "seed": report.seed,
        "experts_left": report.experts_left, "parameters": report.parameters, "experts": report.experts,
        "parameters_before": report.parameters_before, "gone": json.dumps(report.gone),
        "bytes": (report.parameters_before - report.parameters) * small.model.dtype.itemsize,
    }  # fmt: skip
    return {
        name: {
            **told,
            "domain": name,
            "chosen_on": name in chosen_on,
            **compare(before[name], after[name], report.seed),
        }
        for name in domains
    }


def _shares(model: nn.Module, trace: Trace) -> dict[Name, float]:
    """The share of each expert in its layer's choices while the trace was recorded."""
    layers = {(layer.place.stack, layer.place.layer, layer.place.module): layer.index for layer in moe_layers(model)}
    return {
        (layers[use.stack, use.layer, use.module], expert): share
        for use in trace.routers
        for expert, share in enumerate(use.shares)
    }


def _gone(small: Compressed, shares: Mapping[Name, float]) -> float:
    """The share of choices that fell on experts that are gone, mean over layers."""
    return sum(shares.get(name, 0.0) for name in small.report.gone) / len({layer for layer, _ in shares})


def largest_compression(frame: pd.DataFrame, within: float = 0.01) -> pd.DataFrame:
    """How much of the experts can go before perplexity rises by ``within``, by the measured budgets.

    Args:
        frame: a compression curve.
        within: rise of perplexity that is allowed; 0.01 is 1 %.

    Returns:
        One row per method and domain: method, domain, removed (the largest share of expert parameters removed such
        that there and at every smaller one the ratio is at most 1 + ``within``, 0 where even the smallest is too
        much), low (the same for the upper end of the ratio's interval: so much is sure), high (for its lower end: the
        next share that was tried is surely too much; NaN where none larger was tried, since nothing is known beyond)
        and largest (the largest share that was tried). Ratios and ends are means over seeds.

    Raises:
        LamellaError: the frame is not a compression curve, or of several settings, or ``within`` is negative.
    """
    import pandas as pd

    if missing := [name for name in _NEEDED if name not in frame.columns]:
        raise LamellaError(f"The table lacks the column {missing[0]}; give the result of compression_curve.")
    if not within >= 0:
        raise LamellaError(f"within={within} is not a rise of perplexity; 0.01 is 1 %.")
    if several := differing(frame):
        raise LamellaError(f"The table has rows of more than one {several[0]}; give those of one.")
    rows = []
    for (method, domain), part in frame.groupby(["method", "domain"], sort=False):
        means = part.groupby("budget")[["ratio", "low", "high"]].mean().sort_index(ascending=False)
        removed = {
            end: 1 - min([1.0, *means.index[(means[end] <= 1 + within).cummin()]]) for end in ("ratio", "low", "high")
        }
        largest = 1 - float(means.index.min())
        most = removed["low"] if removed["low"] < largest else float("nan")
        rows.append((method, domain, removed["ratio"], removed["high"], most, largest))
    return pd.DataFrame(rows, columns=["method", "domain", "removed", "low", "high", "largest"])


def largest_in_words(largest: pd.DataFrame, within: float = 0.01) -> list[str]:
    """What `largest_compression` says of each method and domain, a sentence each."""
    sentences = []
    for row in largest.to_dict("records"):
        tried = f"{row['largest']:.0%}, the most tried"
        removed = f"at least {tried}," if row["removed"] == row["largest"] else f"{row['removed']:.0%}"
        perhaps = f"perhaps more than {tried}" if math.isnan(row["high"]) else f"perhaps {row['high']:.0%}"
        sentences.append(
            f"{row['method']} on {row['domain']}: {removed} of the experts' parameters can go before perplexity rises "
            f"by {100 * within:g} % (surely {row['low']:.0%}, {perhaps})"
        )
    return sentences


def differing(frame: pd.DataFrame) -> list[str]:
    """The settings in which the rows of a compression curve differ."""
    return [name for name in SETTINGS if name in frame.columns and frame[name].nunique(dropna=False) > 1]


def by_settings(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of a compression curve by the settings in which they differ, in words; "" where they do not."""
    names = differing(frame)
    groups = frame.groupby(names, sort=False, dropna=False) if names else [((), frame)]
    return {
        ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True)): rows for values, rows in groups
    }


def verdict(frame: pd.DataFrame, within: float = 0.05) -> list[str]:
    """What can go, in sentences: how many experts at which cost, which, and what other criteria cost.

    Args:
        frame: a compression curve, the criterion to speak of first: which of them measured best is not to be chosen by
            the text that they are measured on.
        within: rise of perplexity that is allowed on the text that the experts were chosen on.

    Returns:
        The sentences; the first is about the model of ``advised``. Of several settings, those of each.
    """
    return [
        f"{settings}: {sentence}" if settings else sentence
        for settings, rows in by_settings(frame).items()
        for sentence in _verdict(rows, within)
    ]


def _verdict(frame: pd.DataFrame, within: float) -> list[str]:
    if (chosen := advised(frame, within)) is None:
        return ["Nothing was compressed."]
    method, budget, good = chosen
    means = _by_domain(frame)
    worst = _worst(means).loc[budget]
    here = means[(means["budget"] == budget) & (means["method"] == method)]
    row = frame[(frame["budget"] == budget) & (frame["method"] == method)].iloc[0]
    sentences = [_what_goes(row, here, good, within)]
    if not good:
        tried = means.loc[means["method"] == method, "budget"].nunique()
        none = f"None of the {tried} budgets that were tried is" if tried > 1 else "That is not"
        sentences.append(f"{none} surely within what is allowed: keep more experts, or allow more.")
    sentences += _misses(here, within)
    sentences.append(f"They are {_names(json.loads(row['gone']))}.")
    sentences.append(
        "Perplexity over the whole model's at that budget: "
        + ", ".join(f"{name} {ratio:.3f}" for name, ratio in worst.sort_values().items()) + "."
    )  # fmt: skip
    return sentences


def _what_goes(row: pd.Series, here: pd.DataFrame, good: bool, within: float) -> str:
    """How many experts go at which cost, and whether that is allowed on the text that they were chosen on."""
    own, other = here[here["chosen_on"]], here[~here["chosen_on"]]
    judged = other if own.empty else own
    limit = "within" if good else "more than" if judged["ratio"].max() > 1 + within else "perhaps more than"
    allowed = f", {limit} the {100 * within:g}% allowed"
    cost = f"{_rise(own)}{'' if own.empty else allowed}{_elsewhere_in_words(other)}{allowed if own.empty else ''}"
    goes = (
        f"{CRITERIA[row['method']].action} {row['experts'] - row['experts_left']} of {row['experts']} experts "
        f"({1 - row['parameters'] / row['parameters_before']:.1%} of the parameters, {row['bytes'] / 1e9:.3g} GB)"
    )
    said = f"You can {goes} at {cost}" if good else f"To {goes} costs {cost}"
    return f"{said} (by {row['method']}, keeping {row['budget']:.1%} of the experts)."


def advised(frame: pd.DataFrame, within: float = 0.05) -> tuple[str, float, bool] | None:
    """The first criterion of a curve, the smallest budget at which perplexity surely rises by at most ``within``; True.

    By the upper end of the interval, in the worst domain that the experts were chosen on. Where no budget is so good
    the largest one, and False; None where nothing was compressed.
    """
    means = _by_domain(frame)
    if means.empty:
        return None
    method = str(frame.loc[frame["budget"] < 1, "method"].iloc[0])
    highest = _worst(means, "high").xs(method, level="method")
    good = highest.index[highest <= 1 + within]
    return method, float(good.min() if len(good) else highest.index.max()), len(good) > 0


def _by_domain(frame: pd.DataFrame) -> pd.DataFrame:
    """Ratios and ends, the mean over seeds, of what was compressed."""
    columns = [name for name in ("ratio", "low", "high", "choices_gone", "captured_gone") if name in frame.columns]
    means = frame.groupby(["method", "budget", "domain", "chosen_on"], as_index=False)[columns].mean()
    return means[means["budget"] < 1]


def _worst(means: pd.DataFrame, end: str = "ratio") -> pd.Series:
    """Of the domains that the experts were chosen on, if one was measured, by budget and method."""
    known = means[means["chosen_on"]] if means["chosen_on"].any() else means
    return known.groupby(["budget", "method"])[end].max()


def _misses(rows: pd.DataFrame, within: float) -> list[str]:
    """A warning where a text that was not captured loses experts of its own; older tables do not say which do."""
    if "choices_gone" not in rows.columns:
        return []
    hurt = rows[~rows["chosen_on"] & (rows["low"] > 1 + within) & (rows["choices_gone"] > rows["captured_gone"])]
    if hurt.empty:
        return []
    row = hurt.loc[hurt["ratio"].idxmax()]
    return [
        f"The captured text misses {' and '.join(hurt['domain'])}: {row['domain']} gives {row['choices_gone']:.0%} "
        f"of its choices to the experts that go, the captured text {row['captured_gone']:.0%}. Capture text of every "
        "domain that the model is for."
    ]


def _rise(rows: pd.DataFrame) -> str:
    """The costliest of some domains."""
    if rows.empty:
        return "a perplexity that was not measured on the text they were chosen on"
    row = rows.loc[rows["ratio"].idxmax()]
    return f"{row['ratio'] - 1:+.1%} perplexity on {row['domain']} [{row['low'] - 1:+.1%}, {row['high'] - 1:+.1%}]" + (
        f", the worst of {len(rows)} texts they were chosen on" if len(rows) > 1 else ""
    )


def _elsewhere_in_words(rows: pd.DataFrame) -> str:
    if rows.empty:
        return "; no text was measured that they were not chosen on"
    worst = f", the worst of {len(rows)} texts" if len(rows) > 1 else ""
    return f", and {_rise(rows).partition(', the worst')[0]}{worst} that they were not chosen on"


def _names(gone: Sequence[Sequence[int]]) -> str:
    by_layer: dict[int, list[int]] = {}
    for layer, expert in gone:
        by_layer.setdefault(layer, []).append(expert)
    return "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in by_layer.items())


_REROUTING = ("how", "what", "experts", "domain", "perplexity", "baseline", "ratio", "low", "high", "seed")


def rerouting_table(
    model: nn.Module,
    similarity: pd.DataFrame,
    experts: Sequence[Name],
    batches_by_domain: Domains,
    *,
    what: What = "dropped",
    capacity: int | None = None,
    first: First = "arrival",
    aligner: Aligners | None = None,
    across_layers: bool = True,
    measure: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Perplexity of held-out text when experts are closed, by what is done with their tokens.

    Args:
        model: left as it is.
        similarity, across_layers, measure: as for ``find_routes``; the measure is that of the routes with aligner if
            there are any. Those without go by the table's default.
        experts: the (layer, expert) that are closed, all at once.
        batches_by_domain: what the model is called with, one document a row, by name of the domain.
        what, capacity, first: when they are closed to a token; as for ``reroute``.
        aligner: trains the aligners of pairs, as for ``find_routes``; None leaves "similar+aligner" out.
        seed: of the intervals.

    Returns:
        One row per way and domain: how ("none", the model as it is; "similar", ``reroute`` to the most similar expert;
        "similar+aligner", the same behind the aligner; "drop"; "next-choice"), what, experts (JSON), domain,
        perplexity, baseline (of the model as it is), ratio of the two with the 95 % interval low to high (bootstrap
        over documents, paired), seed.

    Raises:
        LamellaError: what ``find_routes``, ``reroute`` or ``next_choice`` refuse, or a domain without text.
    """
    pd = optional_module("pandas", "A table of rerouting")

    overflow: dict[str, Any] = {"what": what, "capacity": capacity, "first": first}
    reach: dict[str, Any] = {"across_layers": across_layers}
    routes = find_routes(similarity, model, experts, measure=measure if aligner is None else None, **reach)
    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "none": nullcontext,
        "similar": lambda: reroute(model, experts, routes, **overflow),
        "drop": lambda: drop(model, experts, **overflow),
        "next-choice": lambda: next_choice(model, experts, **overflow),
    }
    if aligner is not None:
        behind = find_routes(similarity, model, experts, aligner=aligner, measure=measure, **reach)
        ways["similar+aligner"] = lambda: reroute(model, experts, behind, **overflow)
    domains = read_domains(batches_by_domain)
    before = score(model, domains)
    told = {"what": what, "experts": json.dumps([list(name) for name in experts]), "seed": seed}
    rows = []
    for how, way in ways.items():
        with way():
            after = score(model, domains)
        rows += [{"how": how, **told, "domain": name, **compare(before[name], after[name], seed)} for name in domains]
    return pd.DataFrame(rows, columns=list(_REROUTING))


Domains = Mapping[str, Iterable[Batch]]


def read_domains(batches_by_domain: Domains) -> dict[str, list[Batch]]:
    """The batches of each domain, held so that every model sees them.

    Raises:
        LamellaError: there is no domain, or one without batches.
    """
    read = {domain: list(batches) for domain, batches in batches_by_domain.items()}
    if not read or not all(read.values()):
        empty = next((domain for domain, batches in read.items() if not batches), None)
        raise LamellaError(
            "There is no text to measure perplexity on"
            + ("" if empty is None else f" in the domain {empty}")
            + "; give at least one batch for each domain."
        )
    return read


def score(model: nn.Module, domains: Mapping[str, Sequence[Batch]]) -> dict[str, TextScores]:
    """Nats and predicted tokens of every document, by domain."""
    return {domain: text_scores(model, batches, "nll") for domain, batches in domains.items()}


def compare(before: TextScores, after: TextScores, seed: int) -> dict[str, float]:
    """perplexity, baseline (the model before), ratio, and low and high of the ratio, 95 %, paired over documents."""
    interval = ratio_interval(after.sums - before.sums, after.weights, seed=seed)
    return {
        "perplexity": after.perplexity,
        "baseline": before.perplexity,
        "ratio": math.exp(interval.difference),
        "low": math.exp(interval.low),
        "high": math.exp(interval.high),
    }
