"""What rerouting is worth: perplexity with it, with nothing in its place, and with the router's next choice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from lamella.similarity.compression.choosing import Aligners
from lamella.similarity.compression.closing import First, What
from lamella.similarity.compression.perplexity import Domains, compare, read_domains, score
from lamella.similarity.compression.rerouting import drop, next_choice, reroute
from lamella.similarity.compression.routes import find_routes
from lamella.similarity.screening.pairs import Name

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("how", "what", "experts", "domain", "perplexity", "baseline", "ratio", "low", "high", "seed")


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
    import pandas as pd

    closing: dict[str, Any] = {"what": what, "capacity": capacity, "first": first}
    reach: dict[str, Any] = {"across_layers": across_layers}
    routes = find_routes(similarity, model, experts, measure=measure if aligner is None else None, **reach)
    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "none": nullcontext,
        "similar": lambda: reroute(model, experts, routes, **closing),
        "drop": lambda: drop(model, experts, **closing),
        "next-choice": lambda: next_choice(model, experts, **closing),
    }
    if aligner is not None:
        behind = find_routes(similarity, model, experts, aligner=aligner, measure=measure, **reach)
        ways["similar+aligner"] = lambda: reroute(model, experts, behind, **closing)
    domains = read_domains(batches_by_domain)
    before = score(model, domains)
    told = {"what": what, "experts": json.dumps([list(name) for name in experts]), "seed": seed}
    rows = []
    for how, way in ways.items():
        with way():
            after = score(model, domains)
        rows += [{"how": how, **told, "domain": name, **compare(before[name], after[name], seed)} for name in domains]
    return pd.DataFrame(rows, columns=list(COLUMNS))
