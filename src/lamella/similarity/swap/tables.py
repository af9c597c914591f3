"""Swaps in the published layout: the first down, the second across."""

from typing import TYPE_CHECKING

from lamella.errors import LamellaError

if TYPE_CHECKING:
    import pandas as pd


def swap_table(frame: "pd.DataFrame", column: str = "value") -> "pd.DataFrame":
    """One column of ``swap_effects`` as a table: layers by layers, or the experts of one layer by those of another.

    Cells that were not swapped are NaN. Random weights are left out.

    Raises:
        LamellaError: two rows for one cell: several units, kinds or seeds, or experts of more than two layers.
    """
    rows = frame[frame["second_layer"] >= 0]
    what = "expert" if (rows["unit"] == "expert").all() else "layer"
    first, second = f"first_{what}", f"second_{what}"
    if what == "expert" and len(rows[["first_layer", "second_layer"]].drop_duplicates()) > 1:
        raise LamellaError("A table of experts is for two layers; choose the rows of one first and one second layer.")
    if rows.duplicated([first, second]).any():
        raise LamellaError(
            "Some swaps are there more than once; choose the rows of one unit, one metric, one direction and one seed."
        )
    return rows.pivot(index=first, columns=second, values=column).sort_index(axis=0).sort_index(axis=1)
