"""Damaged folders of runs and studies are refused by name or found by the doctor, or say what the whole ones say."""

import random
import shutil
from collections import Counter

import pandas as pd
import pytest
import yaml
from tests.fuzzing.mutations import damage
from tests.fuzzing.oracle import Ending, judge, says_what_is_read
from tests.lab.tiny_runs import question_task, tiny_bert, tiny_settings
from tests.lab.tiny_studies import write_study

from lamella import LamellaError
from lamella.lab.pages import run_report, study_report
from lamella.lab.report.report import render
from lamella.lab.runs.evaluating import evaluate
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.run import RunResult, train
from lamella.lab.runs.settings import settings_of
from lamella.lab.studies import folder as study_folder
from lamella.lab.studies.checks import check_rows
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.runner import run_cells
from lamella.lab.studies.study import summarise

MOLA = {"name": "mola", "r": 2, "num_experts": 2, "top_k": 1, "target_modules": ["query"]}


ANEW = "It is to be trained anew."


def read_run(path):
    """What `lamella evaluate` says of a run, its page, and the doctor's findings, which stand there."""
    scores = evaluate(path)
    said = scores.as_dict(), {name: column.tolist() for name, column in scores.columns.items()}
    run = RunFolder(path)
    report = run_report(RunResult(run, run.metrics()), settings_of(path))
    return said, render(report), [str(finding) for finding in report.findings]


def read_finished_study(path):
    """What `lamella compare` says of a folder in which nothing is left to do, its page, and what is to be done anew."""
    recipe, folder = read_study(str(path)), StudyFolder(path)
    cells = recipe.cells()
    folder.adopt(cells)
    folder.begin(cells)
    check_rows(cells, folder)
    run_cells(cells, folder)
    study = summarise(recipe, cells, folder)
    named = [reason for reason in study.not_run if ANEW not in reason]
    if named:
        raise LamellaError(named[0])
    nothing = pd.DataFrame(columns=["method", "backbone", "task"])
    return study.as_dict(nothing), render(study_report("study", study, nothing)), []


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """A finished run and a finished study, each in the place where its damaged copies will lie, and what they say."""
    folder = tmp_path_factory.mktemp("whole")
    bert, task = tiny_bert(folder / "bert"), question_task(folder / "task")
    train(tiny_settings(bert, task, MOLA, max_steps=2), folder / "run")
    recipe = read_study(write_study(folder / "study.yaml", bert, task, max_steps=2), ["seeds=1"])
    cells, study = recipe.cells(), StudyFolder(folder / "study")
    run_cells(cells, study)
    summarise(recipe, cells, study)
    return {kind: (folder / kind, kept(folder / kind), READERS[kind](folder / kind)) for kind in READERS}


READERS = {"run": read_run, "study": read_finished_study}
# What people write on, and what is read most, is damaged more often than one of many files would be.
OFTEN = {"run": ("run.yaml", "metrics.json"), "study": ("study.yaml", "rows")}


def kept(path):
    return shutil.copytree(path, path.with_name(f"{path.name}-kept"))


def case(kind, number, wholes):
    """The ending of a case, and what was said where it ends otherwise."""
    (path, whole, expected), pick = wholes[kind], random.Random(f"{kind} {number}")
    shutil.rmtree(path)
    shutil.copytree(whole, path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and "locks" not in file.parts)
    often = [file for file in files if file.relative_to(path).parts[0] in OFTEN[kind]]
    file = pick.choice(often if pick.random() < 0.4 else files)
    how = damage(file, pick)

    def read():
        said = READERS[kind](path)
        if said[0] == expected[0] and said[2]:  # where the scores are others, a finding on the page comes too late
            raise LamellaError(said[2][0])
        return said

    ending, why = judge(read, expected, lambda: another_study(path))
    return ending, f"{number} {file.relative_to(path)}: {how}: {why}"[:400] if ending is Ending.OTHER else None


def another_study(path):
    """Another valid recipe: all that it says is read."""
    recipe = path / "study.yaml"
    return recipe.is_file() and says_what_is_read(
        yaml.safe_load(recipe.read_text(encoding="utf-8")), read_study(str(path)).written()
    )


@pytest.fixture
def never_anew(monkeypatch):
    """A study that is another one is not carried out."""

    def refuse(*args, **kwargs):
        raise LamellaError(ANEW)

    monkeypatch.setattr(study_folder, "train", refuse)


@pytest.mark.parametrize("kind", READERS)
def test_a_broken_folder_is_named_or_says_the_same(wholes, never_anew, kind):
    endings = [case(kind, number, wholes) for number in range(6)]

    assert not [said for _, said in endings if said]
    assert Ending.NAMED in {ending for ending, _ in endings}


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "count"), [("run", 500), ("study", 250)])
def test_many_are(wholes, never_anew, kind, count):
    endings = [case(kind, number, wholes) for number in range(count)]
    others = [said for _, said in endings if said]

    print(kind, {ending.value: count for ending, count in Counter(ending for ending, _ in endings).items()})
    assert not others, "\n".join(others)
