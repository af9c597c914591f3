"""Which experts cluster: a tree whose joints stand at the normalised error between the groups they join."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lamella.lab.report.axis import Axis, round_axis

_MOST_LEAVES = 64
_ROW = 18  # pixels


@dataclass(frozen=True)
class Tree:
    """Joints as paths in percent across and pixels down, leaves with their place, and the axis.

    ``whole`` says that every expert is a leaf; otherwise a leaf is a group, named with its size.
    """

    joints: tuple[tuple[tuple[float, float], ...], ...]
    leaves: tuple[tuple[float, str], ...]
    ticks: tuple[tuple[float, str], ...]
    height: int
    whole: bool


def tree(pairs: pd.DataFrame) -> Tree | None:
    """Average linkage of the experts by the mean of both directions; None where fewer than three have both.

    Experts that some partner was not measured with are left out.
    """
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    distances = _distances(pairs)
    if len(distances) < 3:
        return None
    joined = linkage(squareform(distances.to_numpy(), checks=False), method="average")
    names = [f"{layer}.{expert}" for layer, expert in distances.index]
    whole = len(names) <= _MOST_LEAVES
    drawn = dendrogram(
        joined, no_plot=True, labels=names, truncate_mode=None if whole else "lastp", p=_MOST_LEAVES,
        orientation="right",
    )  # fmt: skip
    axis = round_axis([0.0, *np.asarray(drawn["dcoord"]).flatten().tolist()])
    # scipy puts leaf i at 5 + 10 i
    joints = tuple(
        tuple((_at(axis, float(d)), round(float(i) / 10 * _ROW, 1)) for d, i in zip(depth, place, strict=True))
        for depth, place in zip(drawn["dcoord"], drawn["icoord"], strict=True)
    )
    leaves = tuple((round((at + 0.5) * _ROW, 1), str(name)) for at, name in enumerate(drawn["ivl"]))
    ticks = tuple((_at(axis, tick), text) for tick, (_, text) in zip(axis.ticks, axis.marks(), strict=True))
    return Tree(joints, leaves, ticks, _ROW * len(leaves), whole)


def _at(axis: Axis, value: float) -> float:
    """Zero lies at the right, where the leaves have their names."""
    return round(100 - axis.at(value), 2)


def _distances(pairs: pd.DataFrame) -> pd.DataFrame:
    """The symmetric table of distances, experts by experts, zero on the diagonal and without a gap."""
    others = pairs[pairs["kind"] == "pair"]
    sources = list(zip(others["source_layer"], others["source_expert"], strict=True))
    targets = list(zip(others["target_layer"], others["target_expert"], strict=True))
    names = sorted(set(sources) | set(targets))
    place = {name: at for at, name in enumerate(names)}
    table = np.full((len(names), len(names)), np.nan)
    table[[place[name] for name in sources], [place[name] for name in targets]] = others["nmse"]
    both = (table + table.T) / 2
    np.fill_diagonal(both, 0.0)
    distances = pd.DataFrame(both, index=names, columns=names)
    while distances.isna().to_numpy().any():
        worst = distances.isna().sum().idxmax()
        distances = distances.drop(index=[worst], columns=[worst])
    return distances
