"""The arms of an alignment: aligners, each scored on one text, that one table holds beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from lamella.similarity.study import StudyFolder

_NOTED = "alignment"
_ELSEWHERE = ", scored on "


def arm_name(aligner: str, scored_on: str | None) -> str:
    """What the table calls an aligner; errors on another text never stand for those on the captured one."""
    return aligner if scored_on is None else f"{aligner}{_ELSEWHERE}{scored_on}"


def noted_arms(folder: StudyFolder) -> dict[str, dict[str, Any]]:
    """The settings and notes of each arm of a study's alignment, by name."""
    arms: dict[str, dict[str, Any]] = (folder.facts(_NOTED) or {}).get("aligners", {})
    return arms


def keep_arms(folder: StudyFolder, tables: Sequence[pd.DataFrame], settings: dict[str, Any]) -> tuple[Path, list[str]]:
    """Writes the tables of arms, one a seed, beside what the study's alignment holds of other arms and seeds.

    Rows of the same arm with other settings, and of another capture, go.

    Returns:
        Where the table lies, and the notes of these arms.
    """
    import pandas as pd

    noted = noted_arms(folder)
    before = None if folder.is_stale(_NOTED) else folder.table(_NOTED)
    new = {_of(table): table for table in tables}
    names = {name for name, _ in new}
    old = {} if before is None else {_of(rows): rows for _, rows in before.groupby(["aligner", "seed"], sort=False)}
    kept = {at: rows for at, rows in old.items() if at[0] not in names or _settings(noted.get(at[0])) == settings}
    place = list(dict.fromkeys(name for name, _ in [*old, *new]))  # a second run changes no order
    rows = {**kept, **new}
    ordered = sorted(rows, key=lambda at: (_ELSEWHERE in at[0], place.index(at[0]), at[1]))
    notes = {
        name: sorted({note for at in new if at[0] == name for note in new[at].attrs.get("notes", [])}) for name in names
    }
    others = {name: arm for name, arm in noted.items() if name in {at[0] for at in kept} - names}
    # between the two notes a kill leaves arms of unknown settings, which the next run replaces
    folder.note(_NOTED, {"aligners": others})
    path = folder.write(_NOTED, pd.concat([rows[at] for at in ordered], ignore_index=True))
    mine = {name: {**settings, "notes": notes[name]} for name in place if name in names}
    folder.note(_NOTED, {"aligners": others | mine})
    return path, sorted({note for name in names for note in notes[name]})


def _of(table: pd.DataFrame) -> tuple[str, int]:
    """Arm and seed of a table of one."""
    return str(table["aligner"].iloc[0]), int(table["seed"].iloc[0])


def _settings(arm: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if arm is None else {name: value for name, value in arm.items() if name != "notes"}
