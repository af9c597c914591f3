"""How long a study of composition will take."""

from __future__ import annotations

from dataclasses import replace

from lamella.lab.studies.composition.grid import CompositionGrid, Stages
from lamella.lab.studies.composition.running import CompositionFolder
from lamella.lab.studies.planning import Plan, guess_scoring, plan


def plan_stages(grid: CompositionGrid, stages: Stages, folder: CompositionFolder, jobs: int = 1) -> Plan:
    """As `lamella.lab.studies.planning.plan`, with the time that every model takes to answer the tests."""
    # on the plain backbone, since it has the size of those with a head that are yet to be made
    cells = [replace(cell, settings=cell.settings.model_copy(update={"model": grid.backbone})) for cell in stages.all]
    found = plan(cells, folder, jobs)
    timed = {cell.task for cell in cells if folder.finished(cell.key)}
    guessed = sum(cell.task not in timed for cell in cells)
    if not guessed:
        return found
    tests = [task.splits["test"] for task in folder.tests.loaded().values()]
    return replace(found, hours=found.hours + guessed * guess_scoring(cells[0].settings, tests) / jobs / 3600)
