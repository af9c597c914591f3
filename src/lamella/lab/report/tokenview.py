"""What the page's script needs to colour texts, small enough for one page: layers, shares, sparse weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from jinja2.utils import htmlsafe_json_dumps

from lamella.errors import LamellaError
from lamella.lab.report.sections import draw, section
from lamella.lab.report.tokens import TokenLayer, TokenText

if TYPE_CHECKING:
    from markupsafe import Markup

    from lamella.lab.report.report import Report


MOST_TOKENS = 10_000  # on the page: more take a browser seconds to lay out
MOST_BYTES = 3_500_000  # of tokens and weights on the page
_LONGEST = 200  # characters of one token
_BYTES = 7  # of one weight as written: "12,345,"
_VISIBLE = str.maketrans({"\n": "↵", "\r": "␍", "\t": "⇥"})


@dataclass(frozen=True)
class ShownText:
    """A text's title, and what was left out of it, empty where nothing was."""

    title: str
    cut: str


@dataclass(frozen=True)
class TokenView:
    """The token section: its texts, the names in the layer switch, and the script's data.

    `data` holds "layers", each with name, experts, shares (per mille of all weight) and words; and "texts", each with
    tokens and, per layer, None or for every token its experts by falling weight: [expert, per mille, expert, ...].
    """

    texts: tuple[ShownText, ...]
    layers: tuple[str, ...]
    data: dict[str, Any]


def token_view(texts: Sequence[TokenText]) -> TokenView | None:
    """Lay out texts; None without any. Long texts are cut at a common length, and `ShownText.cut` says so.

    Raises:
        LamellaError: weights do not fit the tokens or are not numbers in 0..1, or texts disagree about a layer.
    """
    names = tuple(dict.fromkeys(layer.name for text in texts for layer in text.layers))
    if not names:
        return None
    tables = [{layer.name: _table(text, layer) for layer in text.layers} for text in texts]
    length = _length(texts, tables)
    shown = tuple(ShownText(text.title, _cut(len(text.tokens), length)) for text in texts)
    layers = [_layer(name, [table[name] for table in tables if name in table]) for name in names]
    data = [
        {
            "tokens": [_token(token) for token in text.tokens[:length]],
            "weights": [_sparse(table[name][:length]) if name in table else None for name in names],
        }
        for text, table in zip(texts, tables, strict=True)
    ]
    return TokenView(shown, names, {"layers": layers, "texts": data})


def _table(text: TokenText, layer: TokenLayer) -> npt.NDArray[np.int64]:
    """(tokens, experts) weights in per mille."""
    place = f"The weights of '{text.title}' in {layer.name}"
    shape = (len(text.tokens), layer.num_experts)
    if len(layer.weights) != shape[0] or any(len(row) != shape[1] for row in layer.weights):
        raise LamellaError(f"{place} must be a row per token with a weight per expert: {shape[0]} by {shape[1]}.")
    weights = np.asarray(layer.weights, dtype=np.float64).reshape(shape)
    if not ((weights >= 0) & (weights <= 1 + 1e-3)).all():
        raise LamellaError(f"{place} must all be numbers in 0..1; look for NaN in the router.")
    return np.rint(1000 * weights).astype(np.int64)


def _length(texts: Sequence[TokenText], tables: Sequence[dict[str, npt.NDArray[np.int64]]]) -> int:
    """How many tokens of each text fit on the page."""
    longest = max((len(text.tokens) for text in texts), default=0)
    count, size = np.zeros(longest, np.int64), np.zeros(longest, np.int64)
    for text, table in zip(texts, tables, strict=True):
        tokens = len(text.tokens)
        count[:tokens] += 1
        written = [len(htmlsafe_json_dumps(_token(token))) + 1 for token in text.tokens]
        size[:tokens] += np.array(written, np.int64)
        for weights in table.values():
            size[:tokens] += 3 + _BYTES * np.count_nonzero(weights, axis=1)
    fits = (count.cumsum() <= MOST_TOKENS) & (size.cumsum() <= MOST_BYTES)
    return int(fits.sum())


def _cut(tokens: int, length: int) -> str:
    if tokens <= length:
        return ""
    return f"Only the first {length:,} of {tokens:,} tokens are shown, to keep this page light; the shares count all."


def _token(token: str) -> str:
    """The token with its line breaks visible, and not longer than a line or two."""
    seen = token.translate(_VISIBLE)
    return seen if len(seen) <= _LONGEST else f"{seen[:_LONGEST]}…"


def _sparse(weights: npt.NDArray[np.int64]) -> list[list[int]]:
    order = np.argsort(-weights, axis=1, kind="stable")
    return [
        [int(value) for expert in experts if row[expert] for value in (expert, row[expert])]
        for row, experts in zip(weights, order, strict=True)
    ]


def _layer(name: str, tables: Sequence[npt.NDArray[np.int64]]) -> dict[str, Any]:
    """A layer over all texts together."""
    counts = sorted({table.shape[1] for table in tables})
    if len(counts) > 1:
        raise LamellaError(
            f"The texts say that {name} has {' and '.join(map(str, counts))} experts; give texts of one model."
        )
    weights = np.concatenate(tables)
    totals, routed = weights.sum(axis=0), weights[weights.any(axis=1)]
    shares = np.rint(1000 * totals / max(int(totals.sum()), 1)).astype(int)
    leads = np.bincount(routed.argmax(axis=1), minlength=counts[0])
    return {"name": name, "experts": counts[0], "shares": shares.tolist(), "words": _words(leads)}


def _words(leads: npt.NDArray[np.int64]) -> str:
    """Which expert leads most tokens, and which ones none."""
    tokens = int(leads.sum())
    if not tokens:
        return "No token was routed here."
    first = f"Expert {leads.argmax()} has the largest weight in {leads.max() / tokens:.0%} of the tokens"
    idle = np.flatnonzero(leads == 0)
    if len(idle) == 0:
        return f"{first}; every expert leads somewhere."
    if len(idle) > 6:
        return f"{first}; {len(idle)} of {len(leads)} experts lead none."
    names = ", ".join(map(str, idle[:-1])) + (" and " if len(idle) > 1 else "") + str(idle[-1])
    return f"{first}; expert{'s' if len(idle) > 1 else ''} {names} lead{'s' if len(idle) == 1 else ''} none."


@section("Tokens", 60, absent="texts coloured token by token", script="tokens.js")
def tokens_section(report: Report) -> Markup | None:
    """Texts coloured by the experts that their tokens go to."""
    view = token_view(report.texts)
    return None if view is None else draw("tokens", view)
