"""Which blocks a MoLEx picks, by depth, and whether the picks follow what the blocks hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from lamella.statistics import ENDS, holm, resampled_means, spearman
from lamella.tracing import FIRST_COLUMNS
from lamella.tuners.molex.plan import make_plans

if TYPE_CHECKING:
    import pandas as pd

Floats: TypeAlias = npt.NDArray[np.float64]
_TABLES = 10_000  # random pick tables
_WAY_OUT = "Give the folder of a finished run, as `lamella train method=molex -o FOLDER` makes one."


@dataclass(frozen=True)
class Picks:
    """What the routers of one run picked, or of several that differ by their seeds.

    Attributes:
        called: what to call them.
        model: the backbone that they were trained on, as their settings name it.
        depths: the deciding blocks.
        shares: (runs, depths, blocks), how often each block was picked there; a row sums to 1.
        allowed: (depths, blocks), whether it could be.
        trace: the runs' own tables of them, as `lamella.tracing.Trace.frame`, the mean over the runs.
    """

    called: str
    model: str
    depths: tuple[int, ...]
    shares: Floats
    allowed: npt.NDArray[np.bool_]
    trace: pd.DataFrame

    @property
    def by_layer(self) -> Floats:
        """How often each block was picked, over all runs and depths, (blocks,)."""
        return self.shares.mean(axis=(0, 1))

    @property
    def itself(self) -> float:
        """How often a depth picked its own block, so that nothing was mixed in."""
        return float(self.shares[:, range(len(self.depths)), self.depths].mean())

    @property
    def table(self) -> pd.DataFrame:
        """A row per depth and layer that can be picked there: depth, layer, share."""
        import pandas as pd

        shares = self.shares.mean(axis=0)
        rows = [(self.depths[at], layer, shares[at, layer]) for at, layer in np.argwhere(self.allowed).tolist()]
        return pd.DataFrame(rows, columns=["depth", "layer", "share"])


def picks_of(runs: Sequence[Path], model: nn.Module) -> Picks:
    """The picks of finished runs of MoLEx that differ by their seeds, over the rows that they were scored on.

    Args:
        runs: their folders, one at least.
        model: the backbone that is probed, with one stack of blocks.

    Raises:
        LamellaError: no finished run of MoLEx whose router picks blocks, one of another depth, or runs that differ in
            more than their seed.
    """
    import pandas as pd

    settings = [_settings(run) for run in runs]
    alike = [one.model_dump(exclude={"seed"}) for one in settings]
    if other := next((run for run, one in zip(runs, alike, strict=True) if one != alike[0]), None):
        raise LamellaError(
            f"{other} and {runs[0]} differ in more than their seed, so that their picks have no mean. Probe with runs "
            "of the same settings, or with one at a time."
        )
    traces = [_trace(run, model) for run in runs]
    (plan,) = make_plans(model, settings[0].method.config(), locate_stacks(model))
    candidates = {depth.index: depth.candidates for depth in plan.depths}
    blocks = range(int(traces[0]["num_experts"].max()))
    by_depth = [trace.pivot_table(index="layer", columns="expert", values="share") for trace in traces]
    depths = tuple(map(int, by_depth[0].index))
    picked = [shares.reindex(index=depths, columns=blocks).fillna(0.0).to_numpy(float) for shares in by_depth]
    allowed = np.asarray([[block in candidates[depth] for block in blocks] for depth in depths])
    keys = ["adapter", "stack", "layer", "module", "expert"]
    trace = pd.concat(traces).groupby(keys, as_index=False, sort=False).mean(numeric_only=True)
    called = settings[0].label if len(runs) == 1 else f"{len(runs)} runs like {settings[0].label}"
    return Picks(called, settings[0].model, depths, np.stack(picked), allowed, trace)


def _settings(run: Path) -> Any:
    """Of a run whose router picks blocks of the model that it is of."""
    if not (run / "run.yaml").is_file():
        raise LamellaError(f"{run} holds no run. {_WAY_OUT}")
    settings = settings_of(run)
    method: Any = settings.method
    if method.name != "molex":
        raise LamellaError(f"{run} is a run of {method.name}, and only MoLEx picks blocks of the model. {_WAY_OUT}")
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
    return settings


def _trace(run: Path, model: nn.Module) -> pd.DataFrame:
    """The picks of a finished run on a model of this depth."""
    trace = RunFolder(run).table("trace.parquet", *FIRST_COLUMNS) if RunFolder(run).finished else None
    if trace is None or trace.empty:
        raise LamellaError(f"{run} has no trace of its picks: it is not finished, or has no guests. {_WAY_OUT}")
    (stack,) = locate_stacks(model)
    blocks = int(trace["num_experts"].max())
    if blocks != stack.depth or trace["stack"].nunique() > 1:
        raise LamellaError(
            f"{run} picks among {blocks} blocks, and the model that is probed has {stack.depth}: their layers are "
            f"not the same. Probe the run's own model, {settings_of(run).model}."
        )
    return trace


def pick_correlations(picks: Picks, scores: Mapping[tuple[str, str], Floats], seed: int = 0) -> pd.DataFrame:
    """Spearman's correlation of how often each block is picked with what is behind it, beside that of random picks.

    A random pick table is the picks' own in which, at every depth, the shares are dealt anew to the candidates: a
    router as decided as this one, to which all blocks are the same, as they are to the random policy. Runs are dealt
    alike, as what they agree on without any property behind it is no more evidence than one run's.

    Args:
        picks: of the runs.
        scores: by property and measure, of test rows behind each block, (blocks, seeds, rows).
        seed: of the random tables.

    Returns:
        A row per property and measure: property, measure, rho, low and high (the 95 % interval of a bootstrap over
        test rows, the probes' seeds and the runs), random_low and random_high (95 % of random tables), p (the share of
        random tables with a correlation at least as large; the table itself counts as one) and p_holm (Holm's, over
        the properties of a measure). NaN where all blocks are picked alike, or a measure is constant.
    """
    import pandas as pd

    # sums in another order leave dust, which would tell equal shares apart
    picked = picks.by_layer[None].round(9)  # (1, blocks)
    by_run = resampled_means(picks.shares.mean(axis=1).T[:, :, None], seed=seed).T.round(9)  # (draws, blocks)
    at_random = random_tables(picks, np.random.default_rng(seed)).round(9)  # (tables, blocks)
    rows = []
    for (name, measure), behind in scores.items():
        values = behind.mean(axis=(1, 2))[None].round(9)  # (1, blocks)
        rho = float(spearman(picked, values)[0])
        drawn = np.nan_to_num(spearman(resampled_means(behind).T.round(9), by_run))  # (draws,)
        null = np.nan_to_num(spearman(at_random, values))  # (tables,)
        p_value = (int((null >= rho - 1e-12).sum()) + 1) / (len(null) + 1)
        found = (rho, *np.quantile(drawn, ENDS), *np.quantile(null, ENDS), p_value)
        rows.append((name, measure, *(map(float, found) if np.isfinite(rho) else [math.nan] * len(found))))
    columns = ["property", "measure", "rho", "low", "high", "random_low", "random_high", "p"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_holm=table.groupby("measure")["p"].transform(lambda p: holm(p.tolist())))


def random_tables(picks: Picks, generator: np.random.Generator) -> Floats:
    """How often each block is picked in random pick tables, (tables, blocks)."""
    shares = picks.shares.mean(axis=0)  # (depths, blocks)
    summed = np.zeros((_TABLES, shares.shape[1]))
    for row, allowed in zip(shares, picks.allowed, strict=True):
        summed[:, allowed] += generator.permuted(np.tile(row[allowed], (_TABLES, 1)), axis=1)
    return summed / len(shares)
