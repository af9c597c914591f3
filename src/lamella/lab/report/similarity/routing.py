"""Where tokens went, and where they go after a swap."""

import math

import pandas as pd

from lamella.lab.report.curves import require_columns
from lamella.lab.report.heatmap import BANDS
from lamella.lab.report.similarity.matrices import Matrix, MatrixCell


def routing_legend() -> list[tuple[int, str]]:
    """The colours with their words."""
    return [(band, words) for band, (_, words) in enumerate(BANDS)]


def routing_matrices(routing: pd.DataFrame | None, shifts: pd.DataFrame | None) -> tuple[Matrix, ...]:
    """Layers by experts: as captured, then before and after each swap that routing was recorded for.

    Args:
        routing: layer, expert, share, selected, dropped.
        shifts: swap (in words), layer, expert, share_before, share_after.

    Raises:
        LamellaError: a column is missing.
    """
    matrices = []
    if routing is not None and len(routing):
        require_columns(routing, ("layer", "expert", "share", "selected", "dropped"), "routing")
        matrices.append(_matrix(routing, "share", "as captured"))
    if shifts is not None and len(shifts):
        require_columns(shifts, ("swap", "layer", "expert", "share_before", "share_after"), "routing after swaps")
        first = shifts[shifts["swap"] == shifts["swap"].iloc[0]]
        matrices.append(_matrix(first, "share_before", "before"))
        matrices += [_matrix(rows, "share_after", f"after {swap}") for swap, rows in shifts.groupby("swap", sort=False)]
    return tuple(matrices)


def _matrix(frame: pd.DataFrame, column: str, name: str) -> Matrix:
    experts = sorted(frame["expert"].unique())
    rows = []
    for layer, part in frame.groupby("layer"):
        shares = part.set_index("expert")
        cells = [
            _cell(float(shares.loc[expert, column]) * len(shares), f"layer {layer}, expert {expert}")
            if expert in shares.index
            else None
            for expert in experts
        ]
        rows.append((str(layer), tuple(cells)))
    return Matrix(name, "layer", "expert", tuple(map(str, experts)), tuple(rows), dense=len(experts) > 24)


def _cell(times: float, words: str) -> MatrixCell | None:
    if math.isnan(times):
        return None
    band = next(at for at, (end, _) in enumerate(BANDS) if round(times, 2) < end)
    return MatrixCell(f"{times:.2f}", band, f"{words}: {times:.2f} times an even share")
