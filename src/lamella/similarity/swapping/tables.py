"""Swaps in the published layout: the first down, the second across."""

from typing import TYPE_CHECKING

from lamella.errors import LamellaError

if TYPE_CHECKING:
    import pandas as pd


def swap_table(frame: "pd.DataFrame", column: str = "value") -> "pd.DataFrame":
    """One column of ``swap_effects`` as a table: layers by layers, or the experts of one layer by those of another.

    Cells that were not swapped are NaN. Random weights are left out. An exchange of two layers is the same from either,
    so that it stands in both of its cells.

    Raises:
        LamellaError: two rows for one cell: several units, kinds or seeds, or experts of more than two layers.
    """
    import pandas as pd

    rows = frame[frame["second_layer"] >= 0]
    what = "expert" if (rows["unit"] == "expert").all() else "layer"
    first, second = f"first_{what}", f"second_{what}"
    if what == "expert" and len(rows[["first_layer", "second_layer"]].drop_duplicates()) > 1:
        raise LamellaError("A table of experts is for two layers; choose the rows of one first and one second layer.")
    if rows.duplicated([first, second]).any():
        raise LamellaError(
            "Some swaps are there more than once; choose the rows of one unit, one metric, one direction and one seed."
        )
    if what == "layer":
        mirrored = rows[rows["exchange"] & (rows[first] != rows[second])].rename(columns={first: second, second: first})
        rows = pd.concat([rows, mirrored]).drop_duplicates([first, second])
    return rows.pivot(index=first, columns=second, values=column).sort_index(axis=0).sort_index(axis=1)


def layer_tables(frame: "pd.DataFrame") -> "dict[str, pd.DataFrame]":
    """The scores after swaps of whole layers, layers by layers, by the names of ``kinds``."""
    return {name: swap_table(rows) for name, rows in kinds(frame[frame["unit"] != "expert"]).items()}


def kinds(frame: "pd.DataFrame") -> "dict[str, pd.DataFrame]":
    """Swaps that can be compared, by "unit, metric" and what else they differ in; random weights are left out.

    Names go on with "one way", "behind aligners" and, where there are several, the seed.
    """
    rows = frame[frame["second_layer"] >= 0]
    found = {}
    for (unit, metric, exchange, aligned, seed), alike in rows.groupby(
        ["unit", "metric", "exchange", "aligned", "seed"], sort=False
    ):
        words = [unit, metric, "" if exchange else "one way", "behind aligners" if aligned else ""]
        words += [f"seed {seed}"] if rows["seed"].nunique() > 1 else []
        found[", ".join(filter(None, words))] = alike
    return found
