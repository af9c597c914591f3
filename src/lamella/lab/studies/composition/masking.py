"""What arms lose when one of their LoRAs is left out, in words and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lamella.lab.evidence.evidence import RESAMPLES
from lamella.lab.studies.composition.tables import KL, MIXTURE
from lamella.statistics import Interval, holm, paired_interval

_LEVEL = 0.05


@dataclass(frozen=True)
class _Loss:
    """One arm without one LoRA on one test: its score, and that less the score of the whole arm."""

    arm: str
    dropped: str
    test: str
    score: float
    interval: Interval
    told_apart: bool

    @property
    def words(self) -> str:
        mark = "*" if self.told_apart else ""
        return f"{self.score:.3f} ({self.interval}){mark}"


def masking_words(masked: pd.DataFrame, examples: pd.DataFrame) -> list[str]:
    """A sentence for each masked arm: what leaving out each LoRA changes on the mixture and on that LoRA's own test."""
    found: dict[str, list[str]] = {}
    for one in _losses(masked, examples):
        if one.test in (MIXTURE, one.dropped):
            where = "on the mixture" if one.test == MIXTURE else "on its own test"
            found.setdefault(one.arm, []).append(f"without {one.dropped} {where} {one.words}")
    return [f"{arm} with a LoRA left out: {'; '.join(said)}. {_READING}" for arm, said in found.items()]


def masking_table(masked: pd.DataFrame, examples: pd.DataFrame) -> list[str]:
    """The same on every test, as a heading sentence and a Markdown table; nothing where nothing was masked."""
    found = list(_losses(masked, examples))
    if not found:
        return []
    tests = list(dict.fromkeys(one.test for one in found))
    lines = [["arm", "dropped", *tests], ["---"] * (2 + len(tests))]
    for arm, dropped in dict.fromkeys((one.arm, one.dropped) for one in found):
        here = {one.test: one.words for one in found if (one.arm, one.dropped) == (arm, dropped)}
        lines.append([arm, dropped, *(here[test] for test in tests)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return [f"One LoRA left out. {_READING}", table]


_READING = (
    "In brackets: the difference from the arm with all its LoRAs, with its 95 % interval; a star where it is told "
    "apart from 0 (Holm over the tests and LoRAs of an arm)."
)


def _losses(masked: pd.DataFrame, examples: pd.DataFrame) -> Iterator[_Loss]:
    for arm, of_arm in masked.groupby("method", sort=False):
        whole = examples[(examples["method"] == arm) & (examples["metric"] != KL)]
        places = list(of_arm.groupby(["dropped", "task"], sort=False))
        intervals = [_interval(own, whole[whole["task"] == test]) for (_, test), own in places]
        corrected = holm([one.p_value for one in intervals])
        for ((dropped, test), own), interval, p_value in zip(places, intervals, corrected, strict=True):
            score = float(own["value"].mean())
            yield _Loss(str(arm), dropped, test, score, interval, p_value < _LEVEL)


def _interval(own: pd.DataFrame, whole: pd.DataFrame) -> Interval:
    scores = [np.stack(frame.sort_values("seed")["scores"].to_list()) for frame in (own, whole)]
    return paired_interval(*scores, resamples=RESAMPLES)
