"""What swaps cost: a model's scores on texts with two of its parts in each other's place, against the plain model's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lamella.errors import LamellaError, optional_module
from lamella.files import atomic
from lamella.progress import working
from lamella.similarity.swapping.exchange import Aligner, randomised, swap
from lamella.similarity.swapping.scores import Batch, Metric, TextScores, text_scores
from lamella.similarity.swapping.units import RANDOM, Named, Swap, Unit
from lamella.statistics import ratio_interval

if TYPE_CHECKING:
    import pandas as pd


KEY = (
    "unit", "first_layer", "first_expert", "second_layer", "second_expert", "exchange", "aligned", "metric", "level",
    "seed",
)  # fmt: skip
COLUMNS = (
    *KEY[:7], "distance", "metric", "baseline", "value", "effect", "low", "high", "p_value", "texts", "level", "seed",
)  # fmt: skip
_TABLE, _TEXTS = "swap.parquet", "swap-texts"
Row = dict[str, Any]
# by (source, target) among experts: what the source's tokens pass before the target
PairAligners = Mapping[tuple[Named, Named], Aligner]


def swap_effects(
    model: nn.Module,
    batches: Iterable[Batch],
    swaps: Iterable[Swap],
    unit: Unit = "expert",
    exchange: bool = True,
    metric: Metric = "nll",
    level: float = 0.95,
    seed: int = 0,
    aligners: PairAligners | None = None,
    folder: str | Path | None = None,
    choices: Sequence[int] | None = None,
) -> pd.DataFrame:
    """The effect of each swap on a score of the model, with its interval.

    The score of every text is taken with and without the swap; ``effect`` is the swapped model's score less the plain
    one's on the same texts, ``low`` and ``high`` its interval by drawing texts with replacement. "nll" is nats per
    token, the sum over all texts divided by all their tokens, so that exp(effect) is the ratio of perplexities;
    "accuracy" is the share of texts. ``p_value`` is two-sided and not corrected for the number of swaps.

    Args:
        model: what is measured.
        batches: what the model is called with, see ``text_scores``; one row is one text.
        swaps: pairs to swap, of layers or of (layer, expert); a second of ``RANDOM`` gives the first random weights.
        unit: what changes places.
        exchange: both ways; otherwise the second takes the first's place.
        metric: "nll", lower is better, or "accuracy", higher is better.
        level: coverage of the interval.
        seed: of the bootstrap and of random weights.
        aligners: by (source, target), what the source's tokens pass before the target; every swap needs its own, and
            other aligners another folder: a row does not say which they were.
        folder: of a study: ``swap.parquet`` there gets each row when it is measured and keeps those measured before,
            which are not measured again; ``swap-texts/`` the scores of every text.
        choices: for accuracy of label tokens, the tokens that may be written; None for all.

    Returns:
        A row per swap, in the order given. unit, first_layer, first_expert, second_layer, second_expert (-1 where the
        unit has no expert, and for random weights), exchange, aligned, distance (blocks between the layers; NaN for
        random weights), metric, baseline, value, effect, low, high, p_value, texts, level, seed.

    Raises:
        LamellaError: what ``swap`` and ``text_scores`` refuse; the folder holds swaps of another model or other texts.
    """
    pd = optional_module("pandas", "A table of swaps")

    listed, wanted = list(batches), list(dict.fromkeys(swaps))
    plain = text_scores(model, listed, metric, choices)
    stored = _Stored(None if folder is None else Path(folder), plain, metric)
    named = [_row(one, unit, exchange, aligners is not None, metric, level, seed) for one in wanted]
    effects = [stored.find(row) for row in named]
    with working(f"swapping {unit}s", len(wanted), "swaps", done=len(wanted) - effects.count(None)) as work:
        for at, (one, row) in enumerate(zip(wanted, named, strict=True)):
            if effects[at] is None:
                with _swapped(model, one, unit, exchange, aligners, seed):
                    swapped = text_scores(model, listed, metric, choices, _name(one))
                effects[at] = effect = row | _effect(plain, swapped, level, seed)
                stored.add(effect, swapped)
                work.advance()
    return pd.DataFrame(effects, columns=list(COLUMNS))


class _Stored:
    """The swaps that a folder holds; without a folder, none."""

    def __init__(self, folder: Path | None, plain: TextScores, metric: Metric) -> None:
        pd = optional_module("pandas", "A folder of swaps")

        self._folder, self._plain = folder, plain
        self._rows: dict[tuple[Any, ...], Row] = {}
        if folder is None or not (folder / _TABLE).exists():
            return
        self._rows = {_key(row): row for row in pd.read_parquet(folder / _TABLE).to_dict("records")}
        of_metric = [row for row in self._rows.values() if row["metric"] == metric]
        if of_metric and not self._is_of_plain(_texts_file(folder, of_metric[0])):
            raise LamellaError(
                f"{folder / _TABLE} holds swaps of another model or other texts: the plain model does not score on "
                f"each text what {_TEXTS}/ says it did. Give another folder, or remove both."
            )

    def _is_of_plain(self, path: Path) -> bool:
        import pandas as pd

        if not path.exists():
            return False
        texts, plain = pd.read_parquet(path), self._plain
        if len(texts) != len(plain.sums):
            return False
        # another batch size changes the last digits
        scores_alike = np.allclose(texts["baseline"], plain.sums, rtol=1e-3)
        return scores_alike and np.array_equal(texts["weight"], plain.weights)

    def find(self, row: Row) -> Row | None:
        return self._rows.get(_key(row))

    def add(self, row: Row, swapped: TextScores) -> None:
        """Keeps a measured swap: the scores of its texts first, so that every row of the table has them."""
        import pandas as pd

        self._rows[_key(row)] = row
        if self._folder is None:
            return
        texts = {"baseline": self._plain.sums, "score": swapped.sums, "weight": swapped.weights}
        with atomic(_texts_file(self._folder, row)) as unfinished:
            pd.DataFrame(texts).to_parquet(unfinished, index=False)
        with atomic(self._folder / _TABLE) as unfinished:
            pd.DataFrame(list(self._rows.values()), columns=list(COLUMNS)).to_parquet(unfinished, index=False)


def _swapped(
    model: nn.Module, one: Swap, unit: Unit, exchange: bool, aligners: PairAligners | None, seed: int
) -> AbstractContextManager[None]:
    first, second = one
    if second == RANDOM:
        return randomised(model, first, unit, seed)
    return swap(model, first, second, unit, exchange, aligners)


def _row(one: Swap, unit: Unit, exchange: bool, aligned: bool, metric: Metric, level: float, seed: int) -> Row:
    (first_layer, first_expert), (second_layer, second_expert) = (
        named
        if isinstance(named, tuple) and unit == "expert"
        else (named[0] if isinstance(named, tuple) else named, -1)
        for named in one
    )
    random = one[1] == RANDOM
    return {
        "unit": unit,
        "first_layer": first_layer,
        "first_expert": first_expert,
        "second_layer": second_layer,
        "second_expert": second_expert,
        "exchange": exchange and not random,
        "aligned": aligned and not random,
        "distance": float("nan") if random else float(abs(first_layer - second_layer)),
        "metric": metric,
        "level": level,
        "seed": seed,
    }


def _effect(plain: TextScores, swapped: TextScores, level: float, seed: int) -> Row:
    interval = ratio_interval(swapped.sums - plain.sums, plain.weights, level=level, seed=seed)
    return {
        "baseline": plain.value,
        "value": swapped.value,
        "effect": interval.difference,
        "low": interval.low,
        "high": interval.high,
        "p_value": interval.p_value,
        "texts": len(plain.sums),
    }


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _texts_file(folder: Path, row: Row) -> Path:
    return folder / _TEXTS / f"{'_'.join(str(row[name]) for name in KEY)}.parquet"


def _name(one: Swap) -> str:
    """What errors call the model with this swap."""
    first, second = one
    return f"the model with {'random weights' if second == RANDOM else second} in the place of {first}"


def swap_table(frame: pd.DataFrame, column: str = "value") -> pd.DataFrame:
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


def layer_tables(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The scores after swaps of whole layers, layers by layers, by the names of ``kinds``."""
    return {name: swap_table(rows) for name, rows in kinds(frame[frame["unit"] != "expert"]).items()}


def kinds(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Swaps that can be compared, by "unit, metric" and what else they differ in; random weights are left out.

    Names go on with "one way", "behind aligners" and, where there are several, the seed.
    """
    rows = frame[frame["second_layer"] >= 0]
    by_kind = {}
    for (unit, metric, exchange, aligned, seed), alike in rows.groupby(
        ["unit", "metric", "exchange", "aligned", "seed"], sort=False
    ):
        words = [unit, metric, "" if exchange else "one way", "behind aligners" if aligned else ""]
        words += [f"seed {seed}"] if rows["seed"].nunique() > 1 else []
        by_kind[", ".join(filter(None, words))] = alike
    return by_kind
