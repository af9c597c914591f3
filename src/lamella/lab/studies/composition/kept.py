"""What a study of composition leaves to be committed: its rows, the numbers they are means of, the LoRAs' conflicts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from lamella.errors import LamellaError
from lamella.files import whole, write_whole
from lamella.lab.evidence.evidence import KeptStudy, machine_of
from lamella.lab.methods import read_saved
from lamella.lab.studies.composition.grid import CompositionGrid, read_composition, stages_of
from lamella.lab.studies.composition.masking import masking_table
from lamella.lab.studies.composition.running import folder_of
from lamella.lab.studies.composition.study import interference_words, perplexity_words, standings, tables_of
from lamella.lab.studies.composition.tables import KL, MIXTURE


@dataclass(frozen=True)
class KeptComposition(KeptStudy):
    """A study of composition: its standings are of the same runs on several tests, so cells are counted once."""

    @property
    def planned(self) -> int:
        """Number of cells that the recipe plans."""
        return self.standings[0].planned

    @property
    def run(self) -> int:
        """Number of cells that are kept."""
        return self.standings[0].run


def keep_composition(folder: Path, into: Path) -> str:
    """Copy what a finished study's folder, named as its recipe, says into the folder of kept ones.

    Returns:
        The study's name.

    Raises:
        LamellaError: it is not summarised, or not what the recipe of its name plans.
    """
    name = folder.name
    if not (folder / "results.parquet").is_file():
        raise LamellaError(f"{folder} has no results.parquet. Finish it first: lamella compare {name} -o {folder}.")
    stated = read_saved(yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8")))
    ran = CompositionGrid.parse(stated)
    _check_planned(name, ran)
    found = {table: pd.read_parquet(folder / f"{table}.parquet") for table in tables_of(ran)}
    rows = found["results"][found["results"]["status"] == "done"]
    examples = found["examples"]
    # what is kept of a LoRA is resampled over all of them together; the texts of one are among these
    found["examples"] = examples[(examples["metric"] != KL) | (examples["task"] == MIXTURE)]
    found["results"] = rows
    for table, frame in found.items():
        with whole(_file(into, name, table)) as unfinished:
            frame.to_parquet(unfinished, index=False, compression="zstd")
    record = {"study": stated, "machines": sorted({machine_of(folder / "runs" / key) for key in set(rows["key"])})}
    write_whole(into / f"{name}.yaml", yaml.safe_dump(record, sort_keys=False))
    return name


def load_composition(name: str, folder: Path) -> KeptComposition:
    """The study of a packaged recipe, with what ``folder`` keeps of it; nothing kept means nothing was run.

    Raises:
        LamellaError: the recipe has changed since the study was run, or one of its files is missing.
    """
    grid, record = read_composition(name), folder / f"{name}.yaml"
    files = {table: _file(folder, name, table) for table in tables_of(grid)}
    there = [path.is_file() for path in (record, *files.values())]
    if any(there) and not all(there):
        raise LamellaError(f"{folder} lacks a file of the study {name}. Keep it again: lamella evidence --add.")
    columns = ["task", "method", "metric", "status", "scores", "first", "second", "cosine", "sign_conflict"]
    frames = {table: pd.DataFrame(columns=columns) for table in tables_of(grid)}
    machines: list[str] = []
    if all(there):
        kept = read_saved(yaml.safe_load(record.read_text(encoding="utf-8")))
        _check_planned(name, CompositionGrid.parse(kept["study"]))
        machines = kept["machines"]
        frames = {table: pd.read_parquet(path) for table, path in files.items()}
    cells = stages_of(grid, folder_of(grid, folder)).all
    methods = {cell.method: cell.settings.method for cell in cells}
    found = standings(name, grid, methods, frames["results"], frames["examples"])
    words = [*interference_words(frames["interference"]), *perplexity_words(frames["results"])]
    words += masking_table(frames["masked"], frames["examples"]) if grid.masked else []
    return KeptComposition(name, found, machines, tuple(words), tuple(grid.sources))


def _file(folder: Path, name: str, table: str) -> Path:
    return folder / (f"{name}.parquet" if table == "results" else f"{name}.{table}.parquet")


def _check_planned(name: str, ran: CompositionGrid) -> None:
    """A study may have been run with fewer seeds than its recipe plans, and with nothing else changed."""
    plan = read_composition(name)
    changed = [
        key for key in CompositionGrid.model_fields if key != "seeds" and getattr(plan, key) != getattr(ran, key)
    ]
    changed += [] if set(ran.seed_list) <= set(plan.seed_list) else ["seeds"]
    if changed:
        raise LamellaError(
            f"The study {name} was run with other settings than its recipe now has: {changed[0]} differs. "
            f"Run it again and keep that: lamella compare {name}, then lamella evidence --add runs/{name}."
        )
