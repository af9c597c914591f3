"""What the authors of the four systems say, and what the kept studies say of it: the table of docs/evidence.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from lamella.lab.studies.results import Results
from lamella.similarity.reliability import reliability
from lamella.similarity.swapping import distance_regressions
from lamella.statistics import SIGNIFICANT, Contrast, holm
from studies.answers import learned_nothing
from studies.criteria import ratios
from studies.keep import KeptStudy
from studies.probing import KeptProbes, in_words
from studies.similarity import KeptSimilarity, medians
from studies.tables import interval, markdown, number, p_value

NOT_RUN = "*not run*"
_HOLDS, _FAILS = "holds here", "does not hold here"


@dataclass(frozen=True)
class Compared:
    """A study in which a claim means that one method is better than another.

    Attributes:
        study: its name.
        better, worse: the methods.
        table: title of the table; the first of the study if empty.
        called: what the row calls the place; the table, or the study, if empty.
        noise: strength of noise on the inputs, if it is about what that takes away and not about scores.
    """

    study: str
    better: str
    worse: str
    table: str = ""
    called: str = ""
    noise: float = 0.0


@dataclass(frozen=True)
class Finding:
    """What was found in one place.

    Attributes:
        figure: with its interval.
        verdict: what it means for the claim.
        page: that it is from.
        place: as the row calls it.
    """

    figure: str
    verdict: str
    page: str
    place: str = ""


@dataclass(frozen=True)
class Kept:
    """What is kept of all studies, by name."""

    studies: Mapping[str, KeptStudy]
    similarity: Mapping[str, KeptSimilarity]
    probes: Mapping[str, KeptProbes]


By: TypeAlias = Compared | Callable[[Kept], Finding | None]


@dataclass(frozen=True)
class Claim:
    """One claim: the system it is about, what is said, where; how it is tested here, or why it cannot be."""

    system: str
    says: str
    source: str
    by: Sequence[By] = ()
    cannot: str = ""


def claims_table(kept: Kept) -> str:
    """A row for each claim, as Markdown: what was found in each place, and the verdict."""
    found = {(at, place): one for at, place, one in _contrasts(kept)}
    corrected = holm([one.p_value for one in found.values()])
    found = {key: replace(one, p_value=p) for (key, one), p in zip(found.items(), corrected, strict=True)}
    rows = []
    for at, claim in enumerate(CLAIMS):
        findings = [
            finding for place, by in enumerate(claim.by) if (finding := _finding(by, found.get((at, place)), kept))
        ]
        figures = "; ".join(f"[{one.place or one.page}](evidence/{one.page}.md) {one.figure}" for one in findings)
        rows.append([claim.system, claim.says, claim.source, figures, _verdict(claim, findings)])
    return markdown(["system", "claim", "source", "found here", "verdict"], rows)


def _contrasts(kept: Kept) -> Iterator[tuple[int, int, Contrast]]:
    """The comparisons that were run, by number of the claim and of the place, so that all are corrected together."""
    for at, claim in enumerate(CLAIMS):
        for place, by in enumerate(claim.by):
            if isinstance(by, Compared) and (one := _contrast(by, kept)):
                yield at, place, one


def _contrast(by: Compared, kept: Kept) -> Contrast | None:
    """By how much the claim's side is better; None where either was not run."""
    table = _table(by, kept)
    if table is None:
        return None
    pair = [(by.better, by.worse)]
    if by.noise:  # what is lost, so less is better
        lost = (one for _, strength, one in kept.studies[by.study].losses(table, pair) if strength == by.noise)
        return next((_turned(one) for one in lost), None)
    made = table.contrasts(pair)
    return None if not made else made[0] if table.greater_is_better else _turned(made[0])


def _table(by: Compared, kept: Kept) -> Results | None:
    """The table with both methods; None where either was not run."""
    study = kept.studies.get(by.study)
    table = next((one for one in study.results if one.run and by.table in ("", one.title)), None) if study else None
    return table if table is not None and {by.better, by.worse} <= set(table.means) else None


def _turned(one: Contrast) -> Contrast:
    was = one.interval
    return replace(one, interval=replace(was, difference=-was.difference, low=-was.high, high=-was.low))


def _finding(by: By, one: Contrast | None, kept: Kept) -> Finding | None:
    if not isinstance(by, Compared):
        return by(kept)
    if one is None:
        return None
    verdict = _HOLDS if one.interval.difference > 0 else _FAILS
    if not one.significant:
        half = (one.interval.high - one.interval.low) / 2
        outside = one.interval.low > 0 or one.interval.high < 0
        why = f"p {p_value(one.p_value)} after correction" if outside else f"under {half:.3f} could not have been told"
        verdict = f"undecided: {why}"
    table = _table(by, kept)
    if table and all(len(learned_nothing(table, name)) == len(table.values[name]) for name in (by.better, by.worse)):
        verdict = "undecided: neither learned more than the commonest label"
    return Finding(interval(one), verdict, by.study, by.called or by.table or by.study)


def _verdict(claim: Claim, findings: Sequence[Finding]) -> str:
    if claim.cannot:
        return f"cannot be tested here: {claim.cannot}"
    if not findings:
        return NOT_RUN
    places: dict[str, list[str]] = {}
    for one in findings:
        places.setdefault(one.verdict, []).append(one.place)
    if len(places) == 1:
        return findings[0].verdict
    return "; ".join(f"{', '.join(names)}: {verdict}" for verdict, names in places.items())


def _on(studies: str, better: str, worse: str) -> list[Compared]:
    return [Compared(study, better, worse) for study in studies.split()]


def _step_time(kept: Kept) -> Finding | None:
    times = []
    for name in ("molex-trec", "molex-sst2"):
        costs = kept.studies[name].costs("minilm") if name in kept.studies else {}
        if {"MoLEx", "LoRA"} <= set(costs):
            times.append(costs["MoLEx"]["step time"] / costs["LoRA"]["step time"])
    said = " and ".join(f"{time:.2f}" for time in times)
    verdict = _HOLDS if times and max(times) <= _PUBLISHED_COST else _FAILS
    return Finding(f"{said} times the time of a training step", verdict, "molex-trec") if times else None


_PUBLISHED_COST = 1.826  # times the FLOPs of LoRA


def _deeper_differ_more(kept: Kept) -> Finding | None:
    study = kept.studies.get("mola-claims")
    depth = study.tables.get("depth") if study else None
    if depth is None:
        return None
    said, rising = [], []
    for measure in ("raw", "normalised"):
        each = [rows["layer"].corr(rows[measure], method="spearman") for _, rows in depth.groupby("seed")]
        said.append(f"rank correlation with the layer {number(sum(each) / len(each), '+')} {measure}")
        rising.append(min(each) > 0)
    verdict = _HOLDS if all(rising) else f"{_FAILS} once the size of the experts is taken out" if rising[0] else _FAILS
    return Finding(" and ".join(said), verdict, "mola-claims")


def _surface_before_meaning(kept: Kept) -> Finding | None:
    """Surface must fall with depth, and meaning rise."""
    probes = kept.probes.get(_PROBED)
    if probes is None:
        return None
    trends = probes.trends[probes.trends["kind"] != "syntactic"]
    said = ", ".join(f"{row.property} {in_words(row.rho, row.low, row.high)}" for row in trends.itertuples())
    outward = [(-row.high, -row.low) if row.kind == "surface" else (row.low, row.high) for row in trends.itertuples()]
    holds, fails = [low > 0 for low, _ in outward], [high < 0 for _, high in outward]
    verdict = _HOLDS if all(holds) else _FAILS if any(fails) else "undecided: intervals reach over 0"
    return Finding(f"rank correlation with depth: {said}", verdict, "probing")


def _picked_for_meaning(kept: Kept) -> Finding | None:
    """The task is one of meaning, so its routers must pick the layers that hold it more than random picks do."""
    probes = kept.probes.get(_PROBED)
    if probes is None:
        return None
    rows = probes.followed.merge(probes.trends[["property", "kind"]], on="property")
    rows = rows[rows["kind"] == "semantic"]
    said = ", ".join(
        f"{row.property} {in_words(row.rho, row.low, row.high)}, random picks up to {number(row.random_high, '+')}"
        for row in rows.itertuples()
    )
    verdict = _HOLDS if (rows["p_holm"] < SIGNIFICANT).all() else "undecided: no more than random picks do"
    return Finding(f"rank correlation of picks with {said}", verdict, "probing")


_PROBED = "minilm-trec"


def _error_is_variance(kept: Kept) -> Finding | None:
    study = kept.similarity.get("similarity-tiny-moe")
    table = study.folder.table("alignment") if study else None
    if table is None:
        return None
    measured = reliability(table)
    said = "rank correlation of the error with the variance of what is replaced"
    verdict = f"{_FAILS}: the error is that variance" if measured["raw and variance"] > 0.9 else _HOLDS
    return Finding(f"{said} {number(measured['raw and variance'])}", verdict, "expert-similarity")


def _aligned_stand_in(kept: Kept) -> Finding | None:
    study = kept.similarity.get("similarity-tiny-moe")
    if study is None or study.folder.table("alignment") is None:
        return None
    shares = medians(study)
    said = (
        f"median normalised error {number(shares['all pairs'])}, of a random expert {number(shares['a random expert'])}"
    )
    verdict = _HOLDS if shares["all pairs"] < 0.9 * shares["a random expert"] else _FAILS
    return Finding(said, verdict, "expert-similarity")


def _distance(kept: Kept) -> Finding | None:
    study = kept.similarity.get("similarity-switch-trec")
    swaps = study.folder.table("swap") if study else None
    if swaps is None:
        return None
    fit = distance_regressions(swaps)["router+experts, accuracy"]
    said = f"{number(fit['slope'], '+')} accuracy for each layer, p {number(fit['p_value'])}, {fit['swaps']:.0f} swaps"
    decided = _FAILS if fit["slope"] >= 0 else _HOLDS
    return Finding(
        said, decided if fit["p_value"] < SIGNIFICANT else "undecided: four layers are too few", "expert-similarity"
    )


def _compression(model: str) -> Callable[[Kept], Finding | None]:
    def found(kept: Kept) -> Finding | None:
        table = ratios(model)
        if "default" not in table:
            return None
        default, *others = table.values()
        said = ", ".join(f"{name} {ratio}" for name, ratio in table.items())
        won = all(default.high < other.low for other in others)
        lost = any(default.low > other.high for other in others)
        verdict = _HOLDS if won else _FAILS if lost else "undecided: intervals overlap"
        return Finding(said, verdict, "compression-criteria", model)

    return found


_MOLEX, _MOLA, _MOLE, _EXSIM = "MoLEx", "MoLA", "MOLE", "similarity"
_TRAINED = "molex-trec molex-sst2 molex-movies"
_KEPT = "mixture, what is kept"

CLAIMS = (
    Claim(
        _MOLEX,
        "better than LoRA of the same size",
        "table 1",
        _on(f"{_TRAINED} minilm-five-tasks-others", "MoLEx", "LoRA"),
    ),
    Claim(_MOLEX, "the learned router finds better layers than chance", "§4", _on(_TRAINED, "MoLEx", "MoLEx random")),
    Claim(
        _MOLEX,
        "loses less than LoRA to noise",
        "§4.2",
        [Compared("molex-trec", "MoLEx", "LoRA", called=f"noise of {size}", noise=size) for size in (0.5, 1.0)],
    ),
    Claim(_MOLEX, "one guest is better than two", "table 9", _on("molex-ablations", "MoLEx", "top-2")),
    Claim(
        _MOLEX, "the own layer counts most (alpha .95, not .5)", "table 7", _on("molex-ablations", "MoLEx", "alpha 0.5")
    ),
    Claim(_MOLEX, "balancing the routers helps", "table 7", _on("molex-ablations", "MoLEx", "balance 0")),
    Claim(
        _MOLEX,
        "routers of their own and the cosine router help on some tasks",
        "B.1",
        [Compared("molex-ablations", name, "MoLEx", called=name) for name in ("router per layer", "cosine sigmoid")],
    ),
    Claim(_MOLEX, "costs 1.83 times LoRA", "E.3", [_step_time]),
    Claim(_MOLEX, "early layers hold surface, later ones meaning", "table 4", [_surface_before_meaning]),
    Claim(_MOLEX, "its routers pick layers for the meaning they hold", "figure 2", [_picked_for_meaning]),
    Claim(
        _MOLEX,
        "better than LoRA on larger models too",
        "abstract",
        [Compared("molex-size", "MoLEx", "LoRA", f"trec, {model}") for model in ("minilm@3", "minilm", "mpnet")],
    ),
    Claim(
        _MOLEX,
        "another model's layers are good guests",
        "left open",
        [
            Compared("molex-guests", "MPNet's blocks", other, called=called)
            for called, other in (("beside the own", "MoLEx"), ("beside random blocks", "random blocks"))
        ],
    ),
    Claim(_MOLEX, "GLUE with RoBERTa, E2E with GPT-2", "tables 1, 2", cannot="neither model nor data is at hand"),
    Claim(
        _MOLA,
        "better than LoRA of the same size",
        "tables 1, 2",
        [*_on("trec-shapes", "MoLA inverted triangle", "LoRA"), *_on("minilm-five-tasks", "MoLA 2-4-6-8", "LoRA")],
    ),
    Claim(
        _MOLA,
        "higher layers need more experts",
        "table 1",
        [
            Compared("trec-shapes", "MoLA inverted triangle", "MoLA triangle"),
            Compared("mola-claims", "2-4-6-8", "8-6-4-2"),
        ],
    ),
    Claim(_MOLA, "middle layers do", "table 2", _on("trec-shapes", "MoLA diamond", "MoLA rectangle")),
    Claim(_MOLA, "experts differ more in higher layers", "figure 3", [_deeper_differ_more]),
    Claim(
        _MOLA, "more experts of a smaller rank are better", "table 1", _on("mola-claims", "8 of rank 5", "one expert")
    ),
    Claim(
        _MOLA, "learned routing adds to having experts", "§4", _on("mola-claims", "5-5-5-5", "5-5-5-5, routers left")
    ),
    Claim(
        _MOLA,
        "experts belong where the model's layers differ by task",
        "this project",
        _on("mola-claims", "by diversity", "5-5-5-5"),
    ),
    Claim(
        _MOLA,
        "one adapter for conflicting tasks gains from experts",
        "this project",
        [
            *_on("minilm-five-tasks", "MoLA rank 1", "LoRA"),  # where a run of LoRA learned nothing
            *_on("minilm-five-tasks-rates", "MoLA rank 1, 1.6e-3", "LoRA, 6e-4"),  # each at the best rate known
        ],
    ),
    Claim(
        _MOLA,
        "forgets less than LoRA of tasks learned before",
        "table 5",
        [Compared("minilm-continual", "MoLA 2-4-6-8", "LoRA", measure) for measure in ("OP", "PD")],
    ),
    Claim(
        _MOLA,
        "experts that are added and then left as they are forget less",
        "this project",
        [Compared("minilm-continual", "MoLA growing", "LoRA", measure) for measure in ("OP", "PD")],
    ),
    Claim(
        _MOLA,
        "gains from a start at the weight's singular vectors",
        "GOAT, 2502.16894",
        [Compared("mola-claims", start, "5-5-5-5", called=start) for start in ("goat", "svd")],
    ),
    Claim(
        _MOLE,
        "better than the LoRAs' mean",
        "tables 1 to 3",
        [*_on("mole-domains mole-prose", "MOLE", "uniform"), Compared("mole-domains", "MOLE", "uniform", _KEPT)],
    ),
    Claim(_MOLE, "better than LoRAHub", "table 3", _on("mole-domains", "MOLE", "LoRAHub")),
    Claim(_MOLE, "better than PEM addition", "table 3", _on("mole-domains", "MOLE", "PEM addition")),
    Claim(_MOLE, "balancing the routers helps", "table 7", _on("mole-domains", "MOLE", "MOLE without balance")),
    Claim(
        _MOLE, "balancing is better than a higher temperature", "table 7", _on("mole-settings", "MOLE", "temperature 2")
    ),
    Claim(
        _MOLE,
        "a router for each block is best",
        "table 9",
        [
            Compared("mole-settings", "MOLE", name, _KEPT, called=name)
            for name in ("per matrix", "per sub-layer", "one for the network")
        ],
    ),
    Claim(
        _MOLE,
        "helps on a task that no LoRA was trained for",
        "table 8",
        [Compared("mole-domains", "MOLE", "best LoRA", "airline")],
    ),
    Claim(_MOLE, "its lead over the mean holds with more LoRAs", "table 6", _on("mole-count", "MOLE", "uniform")),
    Claim(
        _MOLE,
        "better than what a sceptic puts in its place",
        "this project",
        [
            Compared("mole-controls", "MOLE", other, called=f"beside {called}")
            for other, called in (
                ("random LoRAs", "random LoRAs"),
                ("fresh LoRA", "a new LoRA"),
                ("learned weights", "one learned weight a LoRA"),
            )
        ],
    ),
    Claim(
        _MOLE,
        "LoRAs of unlike tasks are better together than one LoRA for all",
        "this project",
        _on("minilm-five-tasks-others", "MOLE", "LoRA"),
    ),
    Claim(
        _MOLE,
        "gains from a second LoRA of a domain that it has",
        "this project",
        _on("mole-overlap", "MOLE", "three LoRAs"),
    ),
    Claim(_MOLE, "several subjects in one picture", "tables 1, 2, 4", cannot="no trained model of pictures is at hand"),
    Claim(_EXSIM, "an expert with a large error does what no other does", "table 1", [_error_is_variance]),
    Claim(_EXSIM, "behind an aligner an expert stands in for another", "table 1", [_aligned_stand_in]),
    Claim(_EXSIM, "layers further apart are worse in each other's place", "table 2", [_distance]),
    Claim(
        _EXSIM,
        "which experts can go is known without training (perplexity of a quarter fewer over the whole, other text)",
        "this project",
        [_compression(model) for model in ("tiny-moe", "deep-moe", "smollm2-experts")],
    ),
)
