"""How far trained LoRAs pull the same weights apart."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import pandas as pd
import torch

from lamella.adapters import Factors
from lamella.lab.methods.compositions import Modules


def interference(loras: Mapping[str, Modules]) -> pd.DataFrame:
    """A row per pair of LoRAs: first, second, cosine, sign_conflict.

    ``cosine``: of their deltas as one long vector over all modules. ``sign_conflict``: share of entries, among those
    that neither leaves at zero, where the signs differ; unrelated deltas have a half. Both are nan where the LoRAs
    share no module.
    """
    rows = []
    for first, second in combinations(loras, 2):
        one, other = loras[first], loras[second]
        conflicts, entries, product = 0, 0, 0.0
        for module in one.keys() & other.keys():
            a, b = _delta(one[module]), _delta(other[module])
            product += float((a * b).sum())
            both = (a != 0) & (b != 0)
            conflicts += int(((a > 0) != (b > 0))[both].sum())
            entries += int(both.sum())
        lengths = [sum(float(_delta(own).square().sum()) for own in lora.values()) ** 0.5 for lora in (one, other)]
        scale = lengths[0] * lengths[1]
        row = {"first": first, "second": second, "cosine": product / scale if scale and entries else float("nan")}
        rows.append(row | {"sign_conflict": conflicts / entries if entries else float("nan")})
    return pd.DataFrame(rows)


def _delta(own: Factors) -> torch.Tensor:
    return own.scaling * own.B.double() @ own.A.double()  # (out, in)
