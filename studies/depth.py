"""What MoLA's experts came to along the depth, in the trained runs of a study: how unlike they are, what they add."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from lamella.lab.allocation import allocate_from
from lamella.lab.runs.trained import load_adapted
from lamella.tuners.redundancy import redundancy
from studies.tables import markdown

_MEASURES = ("raw", "normalised", "contribution")


def measured(runs: Mapping[int, Path]) -> pd.DataFrame:
    """A row for each layer of each run of MoLA, by seed; no rows where there are no runs.

    Columns seed and layer; raw and normalised, the distance between experts in the mean over a layer's modules (MoLA,
    definition 6.1; empty where there is one); contribution, by how much the loss on validation rows grows without each
    of them, added up.
    """
    found = []
    for seed, run in runs.items():
        added = allocate_from(str(run), "contribution").needs
        distances = redundancy(load_adapted(run)).groupby("layer")[["raw", "normalised"]].mean()
        found.append(distances.reindex(range(len(added))).assign(contribution=added, seed=seed).reset_index())
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def depth_table(depth: pd.DataFrame) -> str:
    """Means over seeds for each layer, with the smallest and the largest."""
    rows = []
    for layer, values in depth.groupby("layer")[list(_MEASURES)]:
        spread = zip(values.mean(), values.min(), values.max(), strict=True)
        rows.append([layer, *(f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in spread)])
    return markdown(["layer", *_MEASURES], rows)
