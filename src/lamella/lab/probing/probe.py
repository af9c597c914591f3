"""Linear probes: how well a property can be read from what a layer puts out, and how sure that is.

``states`` are ``(layers, rows, width)`` throughout, of the rows of one property.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lamella.lab.probing.tasks import Ints, Property
from lamella.progress import counted
from lamella.statistics import ENDS, Contrast, contrast, mean_intervals, resampled_means, spearman

if TYPE_CHECKING:
    import pandas as pd

Floats: TypeAlias = npt.NDArray[np.floating[Any]]

SEEDS = (0, 1, 2)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of scikit-learn's C, the inverse of the L2 penalty, the heaviest first
_DRAWN = 0.75  # of the training rows, anew for each seed
MEASURES = ("selectivity", "accuracy", "control")
EMBEDDINGS = -1  # the layer before the first block; block t is layer t


@dataclass(frozen=True)
class Probed:
    """What the probes of one property got right on its test rows.

    Attributes:
        of: the property.
        right: by layer and seed, (test rows,) of 0 and 1.
        control: the same of the control task, whose labels each seed deals out anew.
    """

    of: Property
    right: dict[int, dict[int, Floats]]
    control: dict[int, dict[int, Floats]]

    @property
    def selectivity(self) -> dict[int, dict[int, Floats]]:
        """Right less right on the control, by layer and seed, of the same test rows."""
        return {
            layer: {seed: by_seed[seed] - self.control[layer][seed] for seed in by_seed}
            for layer, by_seed in self.right.items()
        }

    @property
    def measures(self) -> dict[str, dict[int, dict[int, Floats]]]:
        """Scores of the test rows, by measure, layer and seed."""
        return dict(zip(MEASURES, (self.selectivity, self.right, self.control), strict=True))

    def behind_blocks(self, measure: str) -> npt.NDArray[np.float64]:
        """Scores of the test rows behind each block, (blocks, seeds, rows); no router can pick the embeddings."""
        scores = self.measures[measure]
        blocks = [list(scores[layer].values()) for layer in sorted(scores) if layer != EMBEDDINGS]
        return np.asarray(blocks, np.float64)

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row per layer: accuracy, control and selectivity, means over rows and seeds with 95 % paired intervals."""
        import pandas as pd

        columns: dict[str, list[Any]] = {
            "property": [self.of.name] * len(self.right),
            "kind": [self.of.kind] * len(self.right),
            "layer": list(self.right),
        }
        for name, scores in self.measures.items():
            intervals = mean_intervals({str(layer): by_seed for layer, by_seed in scores.items()})
            columns[name] = [float(np.mean(list(by_seed.values()))) for by_seed in scores.values()]
            columns[f"{name}_low"], columns[f"{name}_high"] = map(list, zip(*intervals.values(), strict=True))
        return pd.DataFrame(columns).assign(
            floor=self.of.floor,
            classes=len(self.of.classes),
            **{part: len(rows) for part, rows in self.of.parts.items()},
        )

    @property
    def best(self) -> int:
        """The layer of the largest selectivity, the first of equal ones."""
        return max(self.right, key=lambda layer: float(np.mean(list(self.selectivity[layer].values()))))

    @cached_property
    def trend(self) -> tuple[float, float, float]:
        """Rank correlation of selectivity with the layer, the embeddings too: -1 where it falls from each to the next.

        With its 95 % interval, a bootstrap over test rows and seeds.
        """
        by_layer = np.asarray([list(self.selectivity[layer].values()) for layer in sorted(self.right)])
        layers = np.arange(len(by_layer), dtype=float)[None]  # (1, layers)
        of_all = spearman(by_layer.mean(axis=(1, 2))[None].round(9), layers)
        drawn = np.nan_to_num(spearman(resampled_means(by_layer).T.round(9), layers))  # (draws,)
        low, high = np.quantile(drawn, ENDS)
        return float(np.nan_to_num(of_all)[0]), float(low), float(high)

    def beside_the_best(self) -> list[Contrast]:
        """The best layer's selectivity less each other one's, on the same rows and seeds; Holm's over these layers."""
        scores = {str(layer): by_seed for layer, by_seed in self.selectivity.items()}
        return contrast(scores, [(str(self.best), other) for other in scores if other != str(self.best)])


def probe(of: Property, states: Floats, seeds: Sequence[int] = SEEDS) -> Probed:
    """Trains a probe on every layer for the property and for its control, once per seed, and tests it.

    Args:
        of: the property.
        states: of its rows; the first layer is the embeddings.
        seeds: of the training rows that are drawn and of the control's labels.
    """
    dealt = {seed: of.control(seed) for seed in seeds}
    right: dict[int, dict[int, Floats]] = {}
    control: dict[int, dict[int, Floats]] = {}
    for layer, of_layer in enumerate(counted(states, of.name, "layers"), start=EMBEDDINGS):
        right[layer] = {seed: right_on_test(of_layer, of.labels, of.parts, seed) for seed in seeds}
        control[layer] = {seed: right_on_test(of_layer, labels, of.parts, seed) for seed, labels in dealt.items()}
    return Probed(of, right, control)


def right_on_test(states: Floats, labels: Ints, parts: dict[str, Ints], seed: int) -> Floats:
    """Which test rows a logistic regression gets right, (test rows,) of 0 and 1.

    Features are standardised by the training rows. The L2 penalty is the heaviest of those that are best on the
    validation rows.

    Args:
        states: (rows, width).
        labels: (rows,).
        parts: indices of rows, by "train", "validation" and "test".
        seed: of the three quarters of the training rows that are learned from.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train = np.random.default_rng(seed).permutation(parts["train"])[: max(2, round(_DRAWN * len(parts["train"])))]
    if len(np.unique(labels[train])) == 1:  # nothing to tell apart, and the regression refuses
        return np.asarray(labels[parts["test"]] == labels[train[0]], np.float64)
    scaled = StandardScaler().fit(states[train]).transform(states)
    model = LogisticRegression(max_iter=1000, warm_start=True)
    best, predicted = -1.0, labels[parts["test"]]
    for strength in STRENGTHS:
        model.set_params(C=strength).fit(scaled[train], labels[train])
        score = model.score(scaled[parts["validation"]], labels[parts["validation"]])
        if score > best:
            best, predicted = score, model.predict(scaled[parts["test"]])
    return np.asarray(predicted == labels[parts["test"]], np.float64)
