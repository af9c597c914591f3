"""The laboratory: tasks, methods beside their baselines, runs, studies and reports (extra `lab`).

Importing it tells the library the names of its demo models, and lets `lamella.doctor` examine the folders of runs and
studies. What
that needs is imported when it is used.
"""

from pathlib import Path
from typing import Any

from lamella.adapters import BaseNames, register_base_names
from lamella.diagnostics.doctor import register_folder
from lamella.errors import optional_module


def _published(name_or_path: str) -> str:
    from lamella.lab.data.models import published_name

    return published_name(name_or_path)


def _located(name: str) -> str:
    from lamella.lab.data.models import is_demo, located

    return located(name) if is_demo(name) else name


def _examine_run(path: Path, *args: Any) -> None:
    optional_module("lamella.lab.runs.checks", "To examine the folder of a run, lamella").examine_run(path, *args)


def _examine_study(path: Path, *args: Any) -> None:
    optional_module("lamella.lab.studies.checks", "To examine the folder of a study, lamella").examine_study(
        path, *args
    )


register_base_names(BaseNames(_published, _located))
register_folder("run.yaml", _examine_run)
register_folder("study.yaml", _examine_study)
