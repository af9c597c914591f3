"""Which layer chooses which, for groups of texts, and how far such a map is from another policy's.

*Decisions* are a frame with the columns ``row`` (which text), ``layer`` (t, the index of the deciding block) and
``chosen`` (tau, the index of the block that it mixes in): one line per text and layer, of one model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ["row", "layer", "chosen"]
_THIRDS = ("short", "middle", "long")
_CHUNK_ENTRIES = 2_000_000


def check_decisions(decisions: pd.DataFrame) -> None:
    """Raise a LamellaError where a column is missing or a text decides twice at a layer."""
    if missing := [name for name in _COLUMNS if name not in decisions.columns]:
        raise LamellaError(f"Decisions need the columns row, layer and chosen; '{missing[0]}' is missing.")
    if decisions.duplicated(["row", "layer"]).any():
        raise LamellaError(
            "A text has two decisions at one layer. Keep the first of its choices, of one model at a time."
        )


def thirds(lengths: pd.Series) -> pd.Series:
    """The third of each text by its length, short, middle or long; texts as long as a third's end belong below it."""
    import pandas as pd

    ends = np.quantile(lengths, [1 / 3, 2 / 3])
    return pd.Series(np.array(_THIRDS)[np.searchsorted(ends, lengths)], index=lengths.index)


def layer_map(decisions: pd.DataFrame, groups: pd.Series | None = None) -> pd.DataFrame:
    """How often each layer chooses each: a line per group, layer and chosen layer that occurs anywhere, with its share.

    Args:
        decisions: see above.
        groups: the group of each text, such as its class or its `thirds`, indexed by the texts' ``row``; all texts
            are one group, "all", if absent.

    Returns:
        Columns group, layer, chosen, share; shares of a group's layer sum to 1.

    Raises:
        LamellaError: a column is missing, or a text has two decisions at a layer or no group.
    """
    check_decisions(decisions)
    places = decisions.assign(group=_groups(decisions, groups))
    counts = places.groupby(["group", "layer", "chosen"]).size().unstack("chosen", fill_value=0)
    shares = counts.div(counts.sum(axis=1), axis=0).stack()
    return shares.rename("share").reset_index()


def map_differences(
    decisions: pd.DataFrame,
    control: pd.DataFrame,
    groups: pd.Series | None = None,
    *,
    permutations: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """How far a policy's map is from a control's, for the same texts at the same layers: a line per group.

    The distance is the total variation between the two shares of chosen layers, 0 (alike) to 1, in the mean over the
    deciding layers. Its p-value is one-sided: under the null hypothesis a text's decisions could as well be the
    control's, so for each permutation every text swaps the two with probability 1/2, all its layers together.

    Args:
        decisions: of the policy, see above.
        control: of the random policy, say.
        groups: as for `layer_map`.
        permutations: number of random swaps; p is at least 1 / (permutations + 1).
        seed: of the swaps.

    Returns:
        Columns group, distance, expected (mean distance over the permutations: two finite samples always differ), p
        and texts.

    Raises:
        LamellaError: the two do not decide about the same texts at the same layers, or as for `layer_map`.
    """
    import pandas as pd

    check_decisions(decisions)
    check_decisions(control)
    both = decisions[_COLUMNS].merge(control[_COLUMNS], on=["row", "layer"], suffixes=("", "_control"))
    if not len(both) == len(decisions) == len(control):
        raise LamellaError(
            "The policy and its control must decide about the same texts at the same layers: "
            f"{len(decisions)} and {len(control)} decisions have {len(both)} places in common."
        )
    both = both.assign(group=_groups(both, groups))
    generator = np.random.default_rng(seed)
    rows = []
    for group, pairs in both.groupby("group"):
        distance, null = _distances(_differences(pairs), pairs["layer"].nunique(), permutations, generator)
        p_value = (int((null >= distance - 1e-12).sum()) + 1) / (permutations + 1)
        rows.append((group, distance, float(null.mean()), p_value, pairs["row"].nunique()))
    return pd.DataFrame(rows, columns=["group", "distance", "expected", "p", "texts"])


def _groups(decisions: pd.DataFrame, groups: pd.Series | None) -> pd.Series | str:
    if groups is None:
        return "all"
    if unknown := sorted(set(decisions["row"]) - set(groups.index)):
        raise LamellaError(f"The decisions name the text {unknown[0]}, which belongs to no group.")
    group: pd.Series = decisions["row"].map(groups)
    return group


def _differences(both: pd.DataFrame) -> npt.NDArray[np.float64]:
    """(texts, layers * choices): 1 / (deciding texts) where the policy chooses, minus that where the control does."""
    texts, rows = np.unique(both["row"], return_inverse=True)
    layers, layer = np.unique(both["layer"], return_inverse=True)
    choices = np.unique(both[["chosen", "chosen_control"]])
    deciding = np.bincount(layer)[layer]
    shares = np.zeros((len(texts), len(layers), len(choices)))
    np.add.at(shares, (rows, layer, np.searchsorted(choices, both["chosen"])), 1.0 / deciding)
    np.add.at(shares, (rows, layer, np.searchsorted(choices, both["chosen_control"])), -1.0 / deciding)
    return shares.reshape(len(texts), -1)


def _distances(
    differences: npt.NDArray[np.float64], layers: int, permutations: int, generator: np.random.Generator
) -> tuple[float, npt.NDArray[np.float64]]:
    """The distance, and those after each of the random swaps (permutations,)."""
    chunk = max(1, _CHUNK_ENTRIES // differences.size)
    null = []
    for done in range(0, permutations, chunk):
        signs = generator.choice((-1.0, 1.0), size=(min(chunk, permutations - done), len(differences)))
        null.append(np.abs(signs @ differences).sum(1) / (2 * layers))
    return float(np.abs(differences.sum(0)).sum() / (2 * layers)), np.concatenate(null)
