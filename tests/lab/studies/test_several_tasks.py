import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from tests.lab.tiny_studies import RUN

from lamella.errors import LamellaError
from lamella.lab.data import Task, load_task
from lamella.lab.runs.settings import changed, joint_name
from lamella.lab.runs.tasks import task_of
from lamella.lab.studies import cells
from lamella.lab.studies.cells import Cell
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.places import united_costs
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.results import results_of


@pytest.fixture
def written(bert, questions, pairs, tmp_path):
    """A study of heads on two tasks, in one run and in a run for each."""
    tasks = [questions, pairs]
    study = {
        "backbones": [bert],
        "tasks": [tasks],
        "seeds": 1,
        "run": RUN,
        "methods": {"together": {"method": "head"}, "apart": {"method": "head", "apart": True}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return tmp_path, tasks


def test_several_tasks_are_one_table_with_a_part_for_each(written):
    folder, tasks = written
    grid = read_study(str(folder / "study.yaml"))
    together, *apart = grid.cells()

    assert together.settings.task == joint_name(tasks)
    assert [cell.part for cell in apart] == [cell.settings.task for cell in apart] == tasks
    assert {cell.settings.max_steps for cell in apart} == {RUN["max_steps"] // 2}
    assert {cell.task for cell in grid.cells()} == {joint_name(tasks)}
    assert [(table.metric, table.part) for table in grid.tables] == [
        (None, False),
        *((f"{task}/accuracy", True) for task in tasks),
    ]


def test_texts_have_no_accuracy_to_put_them_beside_others_by(written, llama, prose, monkeypatch):
    folder, _ = written
    cell = read_study(str(folder / "study.yaml")).cells()[-1]
    of_texts = replace(cell, settings=changed(cell.settings, {"model": llama, "task": prose, "method": "lora"}))
    with pytest.raises(LamellaError, match=r"put together by accuracy, and .* is a causal-lm task, which has none"):
        of_texts.carry_out(StudyFolder(folder / "out"))
    assert not (folder / "out").exists()
    cell.check()
    monkeypatch.setattr(cells, "task_of", lambda settings: replace(task_of(settings), metric="matthews"))
    cell.check()


def test_runs_on_each_task_make_one_row_beside_the_run_on_all(written):
    folder, tasks = written
    grid, place = read_study(str(folder / "study.yaml")), StudyFolder(folder / "out")
    cells = grid.cells()
    for cell in cells:
        leave(place, cell, load_task(cell.settings.task))
    measured = grid.measured(cells, place)
    frame, examples = measured.tables["results"], measured.tables["examples"]
    main, *parts = results_of(grid, frame, examples)

    assert main.names == ["together", "apart"]
    assert main.strata == [16, 12]
    assert [(one.title, one.part, one.run, one.strata) for one in parts] == [(task, True, 2, []) for task in tasks]
    for method in main.names:
        assert main.means[method] == pytest.approx((parts[0].means[method] + parts[1].means[method]) / 2)
    assert main.against_reference[0].interval.difference == pytest.approx(main.means["apart"] - main.means["together"])
    assert main.floors["majority"]["test"] == pytest.approx(np.mean([one.floors["majority"]["test"] for one in parts]))
    apart = frame[frame["method"] == "apart"].iloc[0]
    assert (apart["trainable_parameters"], apart["seconds_per_step"]) == (20, 0.5)
    assert "apart 20" not in " ".join(grid.notes(cells, place, [main]))  # sizes are told where they were made equal


def leave(place: StudyFolder, cell: Cell, task: Task) -> None:
    """What a run would leave, had it guessed."""
    guesses = np.random.default_rng(len(task.name)).integers(0, 2, len(task.splits["test"]))
    columns = {"label": np.asarray(task.splits["test"]["label"]), "prediction": guesses, "correct": guesses == 1}
    if task.parts:
        columns["task"] = np.asarray(task.splits["test"]["task"])
    run = place.run(cell.key)
    run.mkdir(parents=True)
    pd.DataFrame({"split": "test", **columns}).to_parquet(run / "predictions.parquet")
    by_task = {name: {"accuracy": float(own.mean())} for name, own in right_by_task(task, columns).items()}
    metrics = {
        "metric": "accuracy",
        "test": {"accuracy": float(np.mean([one["accuracy"] for one in by_task.values()]))},
    }
    if task.parts:
        metrics["test"] |= {f"{name}/accuracy": one["accuracy"] for name, one in by_task.items()}
    costs = {"trainable_parameters": 10, "build_seconds": 1.0, "train_seconds": 2.0, "tokens": 7, "steps": 4}
    metrics |= costs | {"kept_step": 4, "peak_memory_bytes": 1, "seconds_per_step": 0.5}
    path = place.row_path(cell.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seconds": 1.0, "settings": cell.settings.written(), "metrics": metrics}))


def right_by_task(task: Task, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not task.parts:
        return {task.name: columns["correct"]}
    return {part.name: columns["correct"][columns["task"] == part.name] for part in task.parts}


def test_a_method_over_loras_composes_those_of_the_runs_apart(written):
    folder, tasks = written
    words = ["methods.apart.method=lora", "methods.MOLE={method: mole, loras: apart}"]
    grid = read_study(str(folder / "study.yaml"), words)
    assert "whose training counts for apart" in grid.notes([], StudyFolder(folder / "out"), [])[0]
    cells = grid.cells()
    apart, (mole,) = ([cell for cell in cells if cell.method == name] for name in ("apart", "MOLE"))

    assert mole.settings.task == joint_name(tasks)
    assert sorted(mole.needs) == sorted(cell.key for cell in apart)
    with pytest.raises(LamellaError, match="must name a method with 'apart: true'"):
        read_study(str(folder / "study.yaml"), ["methods.MOLE={method: mole, loras: together}"])
    with pytest.raises(LamellaError, match="match names MOLE"):
        read_study(str(folder / "study.yaml"), [*words, "budget=equal-parameters", "match=MOLE"])


def test_several_runs_cost_their_sum_and_the_largest_memory():
    one = {"build_seconds": 1.0, "train_seconds": 6.0, "tokens": 7, "steps": 4, "kept_step": 4, "peak_memory_bytes": 9}
    costs = united_costs([one, one | {"train_seconds": 2.0, "peak_memory_bytes": 5}])

    assert costs == {"build_seconds": 2.0, "train_seconds": 8.0, "tokens": 14, "steps": 8, "kept_step": 8,
                     "seconds_per_step": 1.0, "peak_memory_bytes": 9}  # fmt: skip


def test_apart_needs_several_tasks(written):
    folder, tasks = written
    with pytest.raises(LamellaError, match="apart needs several tasks"):
        read_study(str(folder / "study.yaml"), [f"tasks=[{tasks[0]}]"])
