"""The table of an alignment: one row per ordered pair, aligner, seed and kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lamella.errors import optional_module
from lamella.files import atomic
from lamella.similarity.alignment.fitting import Fitted, Settings
from lamella.similarity.pairs import NAMES, Name

if TYPE_CHECKING:
    import pandas as pd

_ELSEWHERE = ", scored on "
RANDOM: Name = (-1, -1)  # the target of a source's random control
COLUMNS = (
    *NAMES, "kind", "aligner", "seed", "samples", "held_out", "steps", "parameters", "samples_per_parameter", "mse",
    "nmse", "cosine", "train_nmse", "identity_nmse", "mean_nmse", "source_variance",
    "over_mean", "over_identity", "over_random",
)  # fmt: skip


def rows_of(fitted: Fitted, settings: Settings, random_errors: Mapping[Name, Tensor]) -> list[dict[str, Any]]:
    """The rows of a stack's pairs, by the names of `COLUMNS`.

    Args:
        fitted: the stack.
        settings: it was trained with.
        random_errors: of each source before a random expert, per held-out document.
    """
    rows: list[dict[str, Any]] = []
    steps, cosine, train_mse = (one.tolist() for one in (fitted.trained.steps, fitted.cosine, fitted.train_mse))
    for at, source in enumerate(fitted.sources):
        errors = source.by_document(fitted.errors[at])
        identity = source.by_document(fitted.identity_errors[at])
        random = random_errors.get(source.name) if fitted.target != RANDOM else None
        tokens = len(source.held_out)
        mse = float(errors.sum()) / tokens
        values = (
            *source.name, *fitted.target, _kind(source.name, fitted.target), settings.kind, settings.seed,
            len(source.train), tokens, steps[at], settings.parameters,
            source.train.y.numel() / settings.parameters if settings.parameters else float("inf"),
            mse, mse / source.variance, cosine[at], train_mse[at] / source.train_variance,
            float(identity.sum()) / tokens / source.variance,
            float(source.mean_errors.sum()) / tokens / source.variance,
            source.variance, source.upper_difference(errors, source.mean_errors),
            source.upper_difference(errors, identity),
            float("nan") if random is None else source.upper_difference(errors, random),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The table of these rows, by source and target."""
    pd = optional_module("pandas", "A table of aligned pairs")

    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.sort_values([*NAMES, "kind"], ignore_index=True)


def by_aligner(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each aligner, those scored on another text apart, by a name that says so; in the order of the table.

    Args:
        frame: an alignment, or several put together with the column ``scored_on``, "" for the captured text.
    """
    names = [label(*one) for one in zip(frame["aligner"], _texts(frame), strict=True)]
    return {str(name): rows for name, rows in frame.groupby(names, sort=False)}


def label(aligner: str, scored_on: str) -> str:
    """What pages call an aligner: errors on another text never stand for those on the captured one."""
    return f"{aligner}{_ELSEWHERE}{scored_on}" if scored_on else aligner


def from_label(name: str) -> tuple[str, str]:
    """Aligner and text of a label."""
    aligner, _, scored_on = name.partition(_ELSEWHERE)
    return aligner, scored_on


def from_first_edition(name: str) -> tuple[str, str]:
    """Aligner and text of a label that the first edition kept in place of both; its layernorm started as published."""
    aligner, scored_on = from_label(name)
    return "published" if aligner == "layernorm" else aligner, scored_on


def with_texts(frame: pd.DataFrame) -> pd.DataFrame:
    """The alignment of a study with the column ``scored_on``, which the first edition wrote into the aligner's name.

    It counted samples per parameter, not the numbers in them: that column becomes NaN.
    """
    if "scored_on" in frame.columns:
        return frame
    aligners, texts = zip(*map(from_first_edition, frame["aligner"]), strict=True)
    return frame.assign(aligner=aligners, scored_on=texts, samples_per_parameter=float("nan"))


def _texts(frame: pd.DataFrame) -> Sequence[str]:
    return list(frame["scored_on"]) if "scored_on" in frame.columns else [""] * len(frame)


def write_alignment(frame: pd.DataFrame, path: str | Path) -> None:
    """Writes an alignment as Parquet, its notes in ``attrs`` included; the file is written atomically."""
    with atomic(Path(path)) as unfinished:
        frame.to_parquet(unfinished, index=False)


def _kind(source: Name, target: Name) -> str:
    if target == RANDOM:
        return "random-target"
    return "self" if source == target else "pair"
