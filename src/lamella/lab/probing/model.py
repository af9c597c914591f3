"""A pretrained model, probed layer by layer, beside what a MoLEx on it picks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lamella.backbones import locate_stacks, mean_states
from lamella.errors import LamellaError
from lamella.files import atomic, write_atomic
from lamella.lab.data import Backbone, load_backbone, load_task
from lamella.lab.data.models import published_name
from lamella.lab.probing.picks import Picks, pick_correlations, picks_of
from lamella.lab.probing.probe import MEASURES, SEEDS, Floats, Probed, probe
from lamella.lab.probing.tasks import properties_of, sentences_of
from lamella.progress import counted
from lamella.texts import text_batches
from lamella.version import __version__

ROWS = 2000
_MAX_LENGTH, _BATCH_SIZE = 128, 32


@dataclass(frozen=True)
class ProbedModel:
    """What the layers of a model hold.

    Attributes:
        model: its name.
        text: name of the task whose sentences were read.
        sentences: how many there were to choose from.
        rows: how many a property has at most.
        properties: each property's probes.
        picks: of runs on the model; None where none was given.
        notes: what was left out or cut, and why.
    """

    model: str
    text: str
    sentences: int
    rows: int
    properties: tuple[Probed, ...]
    picks: Picks | None
    notes: tuple[str, ...]

    @cached_property
    def results(self) -> pd.DataFrame:
        """A row per property and layer, as `Probed.table`."""
        return pd.concat([one.table for one in self.properties], ignore_index=True)

    @cached_property
    def trends(self) -> pd.DataFrame:
        """How each property changes with depth: property, kind, rho, low, high, as `Probed.trend`."""
        rows = [(one.of.name, one.of.kind, *one.trend) for one in self.properties]
        return pd.DataFrame(rows, columns=["property", "kind", "rho", "low", "high"])

    @cached_property
    def correlations(self) -> pd.DataFrame | None:
        """`pick_correlations` with selectivity, accuracy and the control's accuracy behind each block."""
        if self.picks is None:
            return None
        scores = {(one.of.name, name): one.behind_blocks(name) for name in MEASURES for one in self.properties}
        return pick_correlations(self.picks, scores)

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for and how, nested, as plain values."""
        return {
            "model": self.model,
            "text": {"task": self.text, "sentences": self.sentences, "rows": self.rows},
            "probe": {"seeds": list(SEEDS), "pooling": "mean over real tokens", "classifier": "logistic regression"},
            **(
                {}
                if self.picks is None
                else {"runs": {"name": self.picks.called, "number": len(self.picks.shares), "model": self.picks.model}}
            ),
            "lamella_version": __version__,
        }

    def as_dict(self) -> dict[str, Any]:
        """Settings, notes and all tables as plain values for JSON."""
        picks, correlations = self.picks, self.correlations
        return {
            **self.settings,
            "notes": list(self.notes),
            "results": self.results.to_dict("records"),
            "trends": self.trends.to_dict("records"),
            **({} if picks is None else {"picks": picks.by_layer.tolist()}),
            **({} if correlations is None else {"correlations": correlations.to_dict("records")}),
        }

    def save(self, folder: Path) -> None:
        """Write ``results``, ``trends`` and, of runs, ``picks`` and ``correlations`` as parquet, and ``probe.json``."""
        picks = None if self.picks is None else self.picks.table
        tables = {"results": self.results, "trends": self.trends, "picks": picks, "correlations": self.correlations}
        for name, table in tables.items():
            if table is not None:
                with atomic(folder / f"{name}.parquet") as unfinished:
                    table.to_parquet(unfinished, index=False)
        write_atomic(folder / "probe.json", json.dumps({**self.settings, "notes": self.notes}, indent=2) + "\n")


def probe_model(
    name: str,
    text: str = "trec",
    rows: int = ROWS,
    runs: Sequence[Path] = (),
) -> ProbedModel:
    """Probes every layer of a pretrained model, the embeddings too, for each property that a text has rows for.

    Args:
        name: a demo model, a hub id or a path.
        text: a task whose rows are one text each.
        rows: of each property, at most.
        runs: finished runs of MoLEx on this model that differ by their seeds.

    Raises:
        LamellaError: a model with more stacks of blocks than one, a text of other rows or too few, or runs that are
            not of MoLEx, of another depth or of unlike settings.
    """
    backbone = load_backbone(name)
    stacks = locate_stacks(backbone.model)
    if len(stacks) > 1:
        raise LamellaError(
            f"{name} has {len(stacks)} stacks of blocks, which read different tokens. Probe a model with one."
        )
    picks = picks_of(runs, backbone.model) if runs else None
    sentences = sentences_of(load_task(text))
    properties, notes = properties_of(sentences, rows)
    texts = sorted({one for of in properties for one in of.texts}, key=lambda one: (len(one), one))  # little padding
    states, cut = _states(backbone, stacks[0].name, texts)
    place = {one: at for at, one in enumerate(texts)}
    probed = []
    for of in counted(properties, "probing", "properties"):
        probed.append(probe(of, states[:, [place[one] for one in of.texts]]))
    if picks is not None and published_name(picks.model) != published_name(name):
        notes.append(f"{picks.called} was trained on {picks.model}, and {name} was probed, which has as many blocks")
    return ProbedModel(name, text, len(sentences.texts), rows, tuple(probed), picks, (*notes, *cut))


def _states(backbone: Backbone, stack: str, texts: Sequence[str]) -> tuple[Floats, tuple[str, ...]]:
    """(layers, texts, width) of the embeddings and behind each block, and what was cut."""
    batches = text_batches(texts, backbone.tokenizer, max_length=_MAX_LENGTH, batch_size=_BATCH_SIZE)
    states = mean_states(backbone.model.eval(), stack, batches).float().numpy()
    assert states.shape[1] == len(texts)
    return np.asarray(states), batches.notes
