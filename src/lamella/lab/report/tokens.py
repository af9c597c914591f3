"""Texts with the experts each of their tokens used, layer by layer, as a trace recorded them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from lamella.errors import LamellaError
from lamella.lab.report.curves import require_columns

COLUMNS = ("adapter", "stack", "layer", "module", "call", "sequence", "position", "expert", "weight")
Weights = Sequence[Sequence[float]] | npt.NDArray[np.float64]
Router = tuple[str, str, int, str]  # adapter, stack, layer, module


@dataclass(frozen=True)
class TokenLayer:
    """The routing of a text's tokens in one layer, or in one module of it.

    Attributes:
        name: "layer 3" or "layer 3 · query".
        num_experts: how many experts there are.
        weights: (tokens, experts), zero where an expert was not chosen; a row of zeros is a token that was not routed.
    """

    name: str
    num_experts: int
    weights: Weights


@dataclass(frozen=True)
class TokenText:
    """A text as its tokens are shown, and what each layer did with them.

    Attributes:
        title: what the text is, for instance its label.
        tokens: set one after the other as they are, spaces included.
        layers: one per layer or module that can be chosen.
    """

    title: str
    tokens: Sequence[str]
    layers: Sequence[TokenLayer]


def token_texts(
    tokens: pd.DataFrame,
    texts: Sequence[tuple[str, Sequence[str]]],
    num_experts: int | Mapping[tuple[str, int], int],
) -> list[TokenText]:
    """Texts for a report from the tokens of a trace.

    Each layer comes as the mean over its modules, then each module alone. What lies outside the blocks and is not given
    the text's tokens is left out.

    Args:
        tokens: `Trace.tokens`, a row per token, router and chosen expert, columns `COLUMNS`.
        texts: (title, tokens as shown) of every sequence that was recorded, in order of call and sequence; only the
            tokens that are real, without padding.
        num_experts: experts of every layer, or of each (stack, layer).

    Raises:
        LamellaError: a column is missing, or texts and trace do not belong together.
    """
    require_columns(tokens, COLUMNS, "tokens")
    sequences = [rows for _, rows in tokens.groupby(["call", "sequence"])]
    if len(sequences) != len(texts):
        raise LamellaError(
            f"The trace holds {len(sequences)} sequences but {len(texts)} texts were given; give the tokens of every "
            "sequence that was recorded, in the order of the calls."
        )
    made = [
        TokenText(title, shown, _layers(rows, title, len(shown), num_experts))
        for rows, (title, shown) in zip(sequences, texts, strict=True)
    ]
    return [text for text in made if text.layers]


def _layers(
    rows: pd.DataFrame, title: str, length: int, num_experts: int | Mapping[tuple[str, int], int]
) -> list[TokenLayer]:
    routers: dict[Router, npt.NDArray[np.float64]] = {}
    for (adapter, stack, layer, module), group in rows.groupby(["adapter", "stack", "layer", "module"], sort=False):
        if not stack and group["position"].nunique() != length:
            continue  # outside the blocks a module may be given one state of each text, as a pooler is
        experts = num_experts if isinstance(num_experts, int) else _experts_of(num_experts, stack, layer)
        routers[adapter, stack, layer, module] = _dense(group, (length, experts), title, f"{stack} layer {layer}")
    adapters, stacks = ({key[at] for key in routers} for at in (0, 1))

    def name(adapter: str, stack: str, layer: int) -> str:
        return " ".join([adapter] * (len(adapters) > 1) + [stack] * (len(stacks) > 1) + [f"layer {layer}"])

    together: dict[tuple[str, str, int], list[npt.NDArray[np.float64]]] = {}
    for key, weights in routers.items():
        together.setdefault(key[:3], []).append(weights)
    means = [
        TokenLayer(name(*key), weights[0].shape[1], np.mean(weights, axis=0))
        for key, weights in together.items()
        if len(weights) > 1
    ]
    # By module, so that the next entry of the switch is the same module one layer up.
    modules = list(dict.fromkeys(key[3] for key in routers))
    alone = [
        TokenLayer(f"{name(*key[:3])} · {module}", weights.shape[1], weights)
        for module in modules
        for key, weights in routers.items()
        if key[3] == module
    ]
    return [*means, *alone]


def _experts_of(num_experts: Mapping[tuple[str, int], int], stack: str, layer: int) -> int:
    if (stack, layer) not in num_experts:
        raise LamellaError(f"The number of experts of {stack} layer {layer} is missing; the trace has this layer.")
    return num_experts[stack, layer]


def _dense(group: pd.DataFrame, shape: tuple[int, int], title: str, place: str) -> npt.NDArray[np.float64]:
    """(tokens, experts) of one router; the positions of a padded sequence are counted over its real tokens."""
    positions, rank = np.unique(group["position"].to_numpy(), return_inverse=True)
    if len(positions) != shape[0]:
        raise LamellaError(
            f"The text '{title}' has {shape[0]} tokens but {place} routed {len(positions)}: give its real tokens, and "
            "of an encoder-decoder model only the rows of the trace that belong to this text."
        )
    experts = group["expert"].to_numpy()
    if experts.max() >= shape[1]:
        raise LamellaError(f"{place} chose expert {experts.max()}, but it is said to have {shape[1]} experts.")
    dense = np.zeros(shape)
    dense[rank, experts] = group["weight"].to_numpy()
    return dense
