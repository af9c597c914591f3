"""What a compression did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lamella.similarity.screening.pairs import Name

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Report:
    """What a compression grouped, and what is left.

    Attributes:
        method, budget, seed, merged, across_layers: as ``compress`` was called.
        measure: the column of the table that decided; None for a baseline.
        weighted_by_usage: whether averages, and all distances but random ones, were weighted by the routers' counts.
        experts: how many the routers choose from.
        experts_left: how many groups they are in; each is stored once, beside the aligners of its stand-ins.
        expert_parameters_before, expert_parameters: numbers that the experts store, aligners included.
        parameters_before, parameters: numbers that the whole model stores.
        groups: the experts of each group as (layer, expert), first the one that stands for all.
    """

    method: str
    budget: float
    seed: int
    merged: bool
    across_layers: bool
    measure: str | None
    weighted_by_usage: bool
    experts: int
    experts_left: int
    expert_parameters_before: int
    expert_parameters: int
    parameters_before: int
    parameters: int
    groups: tuple[tuple[Name, ...], ...]

    @property
    def kept(self) -> float:
        """Share of the experts' parameters that is still stored."""
        return self.expert_parameters / self.expert_parameters_before

    @property
    def frame(self) -> pd.DataFrame:
        """One row per expert: layer, expert, group, and the layer and expert that stand for it."""
        import pandas as pd

        rows = [(*key, at, *group[0]) for at, group in enumerate(self.groups) for key in group]
        columns = ["layer", "expert", "group", "by_layer", "by_expert"]
        return pd.DataFrame(rows, columns=columns).sort_values(["layer", "expert"], ignore_index=True)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, written: dict[str, Any]) -> Report:
        """From what ``to_dict`` gave, also after JSON made lists of its tuples."""
        groups = tuple(tuple((int(layer), int(expert)) for layer, expert in group) for group in written["groups"])
        return cls(**{**written, "groups": groups})

    def __str__(self) -> str:
        how = "merged" if self.merged else "replaced"
        return (
            f"{self.experts} experts {how} into {self.experts_left} by {self.method}: {self.expert_parameters:,} of "
            f"{self.expert_parameters_before:,} expert parameters stored ({self.kept:.1%}), {self.parameters:,} of "
            f"{self.parameters_before:,} in the whole model"
        )
