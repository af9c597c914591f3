"""Which blocks a MoLEx picks, by depth, and whether the picks follow what the blocks hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import nn

from lamella.backbones import locate_stacks
from lamella.errors import LamellaError
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.settings import settings_of
from lamella.statistics import holm, resampled_means, spearman
from lamella.tracing import FIRST_COLUMNS
from lamella.tuners.molex.plan import make_plans

if TYPE_CHECKING:
    import pandas as pd

Floats: TypeAlias = npt.NDArray[np.float64]
_TABLES = 10_000  # random pick tables
_ENDS = (0.025, 0.975)  # of a 95 % interval


@dataclass(frozen=True)
class Picks:
    """What the routers of a run picked.

    Attributes:
        run: what to call it.
        model: the backbone that it was trained on, as its settings name it.
        depths: the deciding blocks.
        shares: (depths, blocks), how often each block was picked there; a row sums to 1.
        allowed: (depths, blocks), whether it could be.
        trace: the run's own table of them, as `lamella.tracing.Trace.frame`.
    """

    run: str
    model: str
    depths: tuple[int, ...]
    shares: Floats
    allowed: npt.NDArray[np.bool_]
    trace: pd.DataFrame

    @property
    def by_layer(self) -> Floats:
        """How often each block was picked, over all depths, (blocks,)."""
        return self.shares.mean(axis=0)

    @property
    def itself(self) -> float:
        """How often a depth picked its own block, so that nothing was mixed in."""
        return float(np.mean([row[depth] for depth, row in zip(self.depths, self.shares, strict=True)]))

    @property
    def table(self) -> pd.DataFrame:
        """A row per depth and layer that can be picked there: depth, layer, share."""
        import pandas as pd

        rows = [(self.depths[at], layer, self.shares[at, layer]) for at, layer in np.argwhere(self.allowed).tolist()]
        return pd.DataFrame(rows, columns=["depth", "layer", "share"])


def picks_of(run: Path, model: nn.Module) -> Picks:
    """The picks of a finished run of MoLEx, over the rows that it was scored on.

    Args:
        run: its folder.
        model: the backbone that is probed, with one stack of blocks.

    Raises:
        LamellaError: no finished run of MoLEx whose router picks blocks, or one of another depth.
    """
    way_out = "Give the folder of a finished run, as `lamella train method=molex -o FOLDER` makes one."
    if not (run / "run.yaml").is_file():
        raise LamellaError(f"{run} holds no run. {way_out}")
    settings = settings_of(run)
    method: Any = settings.method
    if method.name != "molex":
        raise LamellaError(f"{run} is a run of {method.name}, and only MoLEx picks blocks of the model. {way_out}")
    if method.policy != "learned":
        raise LamellaError(
            f"{run} has policy={method.policy!r}, so that no router picks blocks in it. Give a run of policy=learned; "
            "random picks stand beside its own in any case."
        )
    if method.guests_of is not None:
        raise LamellaError(
            f"{run} picks among blocks of a second model too, {method.guests_of}, and only {settings.model} is probed. "
            "Give a run without guests_of."
        )
    trace = RunFolder(run).table("trace.parquet", *FIRST_COLUMNS) if RunFolder(run).finished else None
    if trace is None or trace.empty:
        raise LamellaError(f"{run} has no trace of its picks: it is not finished, or has no guests. {way_out}")
    stacks = locate_stacks(model)
    blocks = int(trace["num_experts"].max())
    if blocks != stacks[0].depth or trace["stack"].nunique() > 1:
        raise LamellaError(
            f"{run} picks among {blocks} blocks, and the model that is probed has {stacks[0].depth}: their layers are "
            f"not the same. Probe the run's own model, {settings.model}."
        )
    (plan,) = make_plans(model, method.config(), stacks)
    candidates = {depth.index: depth.candidates for depth in plan.depths}
    shares = trace.pivot_table(index="layer", columns="expert", values="share").reindex(columns=range(blocks))
    depths = tuple(map(int, shares.index))
    allowed = np.asarray([[block in candidates[depth] for block in range(blocks)] for depth in depths])
    picked = shares.fillna(0.0).to_numpy(float)
    return Picks(settings.label, settings.model, depths, picked, allowed, trace)


def pick_correlations(picks: Picks, scores: Mapping[tuple[str, str], Floats], seed: int = 0) -> pd.DataFrame:
    """Spearman's correlation of how often each block is picked with what is behind it, beside that of random picks.

    A random pick table is the run's own in which, at every depth, the shares are dealt anew to the candidates: a router
    as decided as this one, to which all blocks are the same, as they are to the random policy.

    Args:
        picks: of a run.
        scores: by property and measure, of test rows behind each block, (blocks, seeds, rows).
        seed: of the random tables.

    Returns:
        A row per property and measure: property, measure, rho, low and high (the 95 % interval of a bootstrap over
        test rows and seeds), random_low and random_high (95 % of random tables), p (the share of random tables with a
        correlation at least as large; the table itself counts as one) and p_holm (Holm's, over the properties of a
        measure). NaN where all blocks are picked alike, or a measure is constant.
    """
    import pandas as pd

    # sums in another order leave dust, which would tell equal shares apart
    picked = picks.by_layer[None].round(9)  # (1, blocks)
    at_random = random_tables(picks, np.random.default_rng(seed)).round(9)  # (tables, blocks)
    rows = []
    for (name, measure), behind in scores.items():
        values = behind.mean(axis=(1, 2))[None].round(9)  # (1, blocks)
        rho = float(spearman(picked, values)[0])
        drawn = np.nan_to_num(spearman(resampled_means(behind).T.round(9), picked))  # (draws,)
        null = np.nan_to_num(spearman(at_random, values))  # (tables,)
        p_value = (int((null >= rho - 1e-12).sum()) + 1) / (len(null) + 1)
        found = (rho, *np.quantile(drawn, _ENDS), *np.quantile(null, _ENDS), p_value)
        rows.append((name, measure, *(map(float, found) if np.isfinite(rho) else [math.nan] * len(found))))
    columns = ["property", "measure", "rho", "low", "high", "random_low", "random_high", "p"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_holm=table.groupby("measure")["p"].transform(lambda p: holm(p.tolist())))


def random_tables(picks: Picks, generator: np.random.Generator) -> Floats:
    """How often each block is picked in random pick tables, (tables, blocks)."""
    summed = np.zeros((_TABLES, picks.shares.shape[1]))
    for shares, allowed in zip(picks.shares, picks.allowed, strict=True):
        summed[:, allowed] += generator.permuted(np.tile(shares[allowed], (_TABLES, 1)), axis=1)
    return summed / len(picks.shares)
