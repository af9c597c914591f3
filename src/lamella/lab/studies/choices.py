"""Which block each text chose in a MoLEx run, for which texts, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from lamella.errors import LamellaError
from lamella.lab.runs.floors import texts_of
from lamella.lab.runs.tasks import task_of
from lamella.lab.runs.trained import Trained, load_trained
from lamella.lab.scoring import length_batches
from lamella.lab.studies.complexity import complexity, depth_correlations
from lamella.lab.studies.layer_maps import layer_map, map_differences, thirds
from lamella.tracing import record_routing

if TYPE_CHECKING:
    from lamella.lab.studies.cells import Cell
    from lamella.lab.studies.study import Study


@dataclass(frozen=True)
class BlockChoices:
    """What a MoLEx run chose on the rows of a split.

    Attributes:
        decisions: a line per text and layer: row, layer, chosen.
        lengths: real tokens of each text, by row.
        classes: name of each text's class, by row; None for tasks without classes.
        measures: how complex each text is, as `complexity` gives it; None for tasks without texts.
    """

    decisions: pd.DataFrame
    lengths: pd.Series
    classes: pd.Series | None
    measures: pd.DataFrame | None

    def maps(self) -> pd.DataFrame:
        """`layer_map` of all texts, then by class and by length: group, layer, chosen, share."""
        parts = [layer_map(self.decisions, groups) for groups in (None, *self._groupings())]
        return pd.concat(parts, ignore_index=True)

    def differences(self, control: BlockChoices) -> pd.DataFrame:
        """`map_differences` from another run on the same texts, for the same groups."""
        groupings = (None, *self._groupings())
        parts = [map_differences(self.decisions, control.decisions, groups) for groups in groupings]
        return pd.concat(parts, ignore_index=True)

    def _groupings(self) -> list[pd.Series]:
        lengths = thirds(self.lengths) + " texts"
        return [lengths] if self.classes is None else [self.classes, lengths]


def block_choices(run: Path, split: str = "test") -> BlockChoices:
    """Runs a trained MoLEx on a split and keeps the first choice of every text at every layer of its first stack.

    Raises:
        LamellaError: there is nothing to load, the model decides by token or batch, or it decides nothing.
    """
    trained = load_trained(run)
    rows, encoded = trained.rows(split)
    batches = length_batches(rows["length"], trained.place.reading.eval_batch_size)
    with record_routing(trained.model, per_token=True) as recorded, torch.no_grad():
        for batch in batches:
            trained.model(**encoded.collator([rows[i] for i in batch]))
    return BlockChoices(
        decisions=_decisions(recorded.tokens, batches, run),
        lengths=pd.Series(rows["length"]),
        classes=_classes(trained, split),
        measures=_measures(trained, split, rows["length"]),
    )


def study_choices(study: Study) -> dict[str, pd.DataFrame]:
    """`choice_tables` of a study's first backbone and task: the first run of each policy that decides for texts."""
    runs: dict[str, Cell] = {}
    for cell in study.cells:
        here = (cell.backbone, cell.task) == (study.cells[0].backbone, study.cells[0].task)
        if here and cell.method not in runs and _decides_for_texts(cell) and study.folder.finished(cell.key):
            runs[cell.method] = cell
    if not runs:
        return {}
    control = next((name for name, cell in runs.items() if _policy(cell) == "random"), None)
    return choice_tables({name: block_choices(study.folder.run(cell.key)) for name, cell in runs.items()}, control)


def _decides_for_texts(cell: Cell) -> bool:
    whole = getattr(cell.settings.method, "granularity", None) == "sequence"
    return whole and _policy(cell) in ("learned", "random") and "test" in task_of(cell.settings).splits


def _policy(cell: Cell) -> str | None:
    """Who chooses the guests of a MoLEx."""
    return getattr(cell.settings.method, "policy", None)


def choice_correlations(policies: dict[str, BlockChoices]) -> pd.DataFrame | None:
    """Rank correlation of each text's complexity with the depth of its guests, per policy; None without texts."""
    measures = next(iter(policies.values())).measures
    if measures is None:
        return None
    return depth_correlations(measures, {name: choices.decisions for name, choices in policies.items()})


def choice_tables(policies: dict[str, BlockChoices], control: str | None) -> dict[str, pd.DataFrame]:
    """What the policies chose as tables by caption, each with the policy in its first column, method.

    Args:
        policies: choices on the same texts, by the name that tables show.
        control: which of them chooses at random, so that what it reaches is chance.
    """
    tables = {}
    if (correlations := choice_correlations(policies)) is not None:
        interval = list(zip(correlations["low"], correlations["high"], strict=True))
        correlations = correlations.rename(columns={"policy": "method"}).assign(interval=interval)
        columns = ["method", "measure", "rho", "interval", "p", "texts"]
        tables["Rank correlation of a text's complexity with how much deeper its guests lie"] = correlations[columns]
    for name, choices in policies.items():
        if control is not None and name != control:
            far = choices.differences(policies[control])
            far.insert(0, "method", name)
            tables[f"Distance of {name}'s map from that of {control}: 0 alike, 1 disjoint"] = far
        shares = choices.maps().pivot_table(index=["group", "layer"], columns="chosen", values="share", sort=False)
        shares = shares.reset_index()
        shares.insert(0, "method", name)
        tables[f"Share of texts by the block that each layer of {name} chose"] = shares
    return tables


def _decisions(tokens: pd.DataFrame, batches: Sequence[Sequence[int]], run: Path) -> pd.DataFrame:
    if tokens.empty or (tokens["position"] >= 0).any() or (tokens["sequence"] < 0).any():
        raise LamellaError(f"{run} does not choose a block for each sequence, so there is no choice of a text to read.")
    first = tokens[(tokens["rank"] == 0) & (tokens["stack"] == tokens["stack"].iloc[0])]
    places = zip(first["call"], first["sequence"], strict=True)
    row = [batches[call][sequence] for call, sequence in places]
    return pd.DataFrame({"row": row, "layer": first["layer"].to_numpy(), "chosen": first["expert"].to_numpy()})


def _classes(trained: Trained, split: str) -> pd.Series | None:
    if not trained.task.label_names:
        return None
    return pd.Series([trained.task.label_names[label] for label in trained.task.splits[split]["label"]])


def _measures(trained: Trained, split: str, lengths: Any) -> pd.DataFrame | None:
    if (texts := texts_of(trained.task, split)) is None:
        return None
    corpus = texts_of(trained.task, "train")
    assert corpus is not None  # the same columns in every split
    return complexity(texts, corpus, lengths)
