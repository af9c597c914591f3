"""The runs of a study of composition: what rests on what, and that nothing but the deltas differs."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.lab.studies.conftest import cell_of, run

from lamella.errors import LamellaError
from lamella.lab.studies.cells import jobs_of
from lamella.lab.studies.composition import HEAD, JOINT
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.planning import plan, tellable
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.runner import run_cells
from lamella.lab.studies.study import summarise


def tensors(folder, cell):
    return load_file(folder.run(cell.key) / "adapter" / "adapter_model.safetensors")


def test_every_cell_is_run_and_is_an_ordinary_run(ran):
    _, cells, folder = ran

    assert len(cells) == 18
    for cell in cells:
        assert folder.failure(cell.key) is None
        metrics = json.loads((folder.run(cell.key) / "metrics.json").read_text())
        assert metrics["saved_equals_loaded"]["equal"]
        assert metrics["seed"] == cell.seed
        examined = cell.method in ("MOLE", "a LoRA", "b LoRA", JOINT, HEAD)
        assert ("diagnosis" in folder.row(cell.key)) == examined
    for cell in (cell for cell in cells if cell.method in ("uniform", "only a", "only b")):
        metrics = folder.row(cell.key)["metrics"]
        assert (metrics["trainable_parameters"], metrics["steps"], metrics["train_seconds"]) == (0, 0, 0)
        assert metrics["build_seconds"] > 0
        assert not (folder.run(cell.key) / "checkpoints").exists()


def test_all_of_a_seed_share_one_trained_head_and_train_none(ran):
    _, cells, folder = ran
    for seed in (0, 1):
        head, *others = (cell for cell in cells if cell.seed == seed)
        base = load_file(folder.base(head.key) / "model.safetensors")
        trained = tensors(folder, head)
        assert torch.equal(base["classifier.weight"], trained["base_model.model.classifier.weight"])
        for cell in others:
            assert cell.settings.model == f"head:{head.key}"
            assert Path(folder.placed(cell.settings).model).name == head.key
            assert not [name for name in tensors(folder, cell) if ".classifier." in name and "xlora" not in name]


def test_loras_learn_their_own_rows_and_the_joint_one_all_of_them(ran):
    study, cells, _ = ran
    tasks = {cell.method: cell.settings.task for cell in cells}

    assert [cell.method for cell in cells][:4] == [HEAD, "a LoRA", "b LoRA", JOINT]
    assert {name: tasks[f"{name} LoRA"] for name in study.sources} == study.sources
    assert tasks[JOINT] == tasks[HEAD] == study.union
    composed = [cell for cell in cells if cell.method in study.methods]
    assert {cell.settings.task for cell in composed} == {f"held:{study.union}"}
    assert all(cell.settings.limit == {"train": 12} for cell in composed)


def test_cells_need_what_they_are_made_from(ran):
    _, cells, _ = ran
    head, a, b = (cell_of(cells, name) for name in (HEAD, "a LoRA", "b LoRA"))

    assert list(head.needs) == []
    assert list(a.needs) == [head.key]
    assert list(cell_of(cells, "MOLE").needs) == [head.key, a.key, b.key]
    assert list(cell_of(cells, "only b").needs) == [head.key, b.key]
    jobs = jobs_of(cells)
    place = {job.key: at for at, job in enumerate(jobs)}
    assert all(place[need] < place[job.key] for job in jobs for need in job.needs)
    assert len(jobs) == 18 + 18 + 4


def test_a_method_composes_the_sources_that_it_names(ran):
    _, cells, folder = ran
    lora, uniform, only = (cell_of(cells, name) for name in ("b LoRA", "uniform", "only b"))

    placed = {name: folder.placed(cell.settings).method.adapters for name, cell in (("u", uniform), ("b", only))}
    assert set(placed["u"]) == {"a", "b"}
    assert placed["b"] == {"b": placed["u"]["b"]} == {"b": str(folder.run(lora.key))}
    assert only.settings.task == uniform.settings.task
    alone, composed = (pd.read_parquet(folder.answers(cell.key)) for cell in (lora, only))
    for left, right in zip(alone["log_probs"], composed["log_probs"], strict=True):
        assert right == pytest.approx(left, abs=1e-5)


def test_masked_methods_answer_without_each_of_their_loras(ran):
    _, cells, folder = ran
    complete, only = (pd.read_parquet(folder.answers(cell_of(cells, name).key)) for name in ("MOLE", "only b"))

    for name in ("MOLE", "uniform"):
        masked = pd.read_parquet(folder.masked(cell_of(cells, name).key))
        sizes = list(masked.groupby("dropped", sort=False).size().items())
        assert sizes == [("a", len(complete)), ("b", len(complete))]
        # of two LoRAs the other one is left, with all the weight
        without_a = masked[masked["dropped"] == "a"]
        for left, right in zip(only["log_probs"], without_a["log_probs"], strict=True):
            assert right == pytest.approx(left, abs=1e-5)
    assert not folder.masked(cell_of(cells, "X-LoRA").key).exists()


def test_keys_say_what_a_cell_rests_on_and_not_where_it_lies(ran, recipe):
    _, cells, _ = ran
    changed = read_study(recipe, ["lora.lr=1e-3"]).cells()

    assert [cell.key for cell in read_study(recipe).cells()] == [cell.key for cell in cells]
    same = {cell.method for cell, other in zip(cells, changed, strict=True) if cell.key == other.key}
    assert same == {HEAD}
    assert len({cell.key for cell in cells}) == 18


def test_what_is_done_is_not_done_again(ran, tmp_path, monkeypatch):
    _, cells, folder = ran
    copy = StudyFolder(tmp_path / "copy")
    shutil.copytree(folder.path, copy.path)
    interrupted = cell_of(cells, "uniform", 1)
    (copy.path / "rows" / f"{interrupted.key}.json").unlink()  # killed between the end of a run and its row
    (copy.path / "rows" / f"{interrupted.key}-answers.json").unlink()
    copy.answers(interrupted.key).unlink()

    def untouched(*args, **kwargs):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr("lamella.lab.studies.folder.train", untouched)
    run_cells(cells, copy)

    assert copy.finished(interrupted.key)
    assert copy.answers(interrupted.key).read_bytes() == folder.answers(interrupted.key).read_bytes()
    assert plan(cells, copy).hours == 0


def test_what_needs_a_failed_cell_fails_and_says_so(recipe, tmp_path):
    _, cells, folder = run(recipe, tmp_path, "seeds=[0]", "lora.router_lr=1")

    assert "no trainable router" in folder.failure(cell_of(cells, "a LoRA").key)
    said = folder.failure(cell_of(cells, "uniform").key)
    assert said.startswith("It needs a LoRA on ")
    assert said.endswith(", which could not be run.")
    assert all(folder.failure(cell.last) is not None for cell in cells if cell.method != HEAD)
    assert folder.finished(cell_of(cells, HEAD).last)


def test_two_processes_give_the_answers_of_one(ran, fresh, tmp_path, monkeypatch):
    monkeypatch.setattr("multiprocessing.get_context", {"spawn": fresh}.__getitem__)
    _, cells, folder = ran
    first = [cell_of(cells, method) for method in (HEAD, "a LoRA", "b LoRA", "uniform")]
    other, seen = StudyFolder(tmp_path), []
    run_cells(first, other, jobs=2, finished=lambda job: seen.append(job.key))

    assert sorted(seen) == sorted(job.key for job in jobs_of(first))
    for cell in first:
        assert other.answers(cell.key).read_bytes() == folder.answers(cell.key).read_bytes()


def test_a_plan_counts_the_time_to_answer(recipe, tmp_path):
    hours = []
    for rows in (1, 10):
        cells = read_study(recipe, [f"test_rows={rows}"]).cells()
        planned = plan(cells, StudyFolder(tmp_path))
        assert (planned.cells, planned.done) == (18, 0)
        hours.append(planned.hours)
        assert tellable(cells) == dict.fromkeys(("a", "b", "c"), pytest.approx((0.05 * 2.8**2 / rows) ** 0.5))
    assert 0 < hours[0] < hours[1]


@pytest.fixture
def searched(recipe, tmp_path):
    """MOLE, uniform and TSV; MOLE's rate and TSV's coefficient are searched for."""
    tree = yaml.safe_load(Path(recipe).read_text())
    del tree["run"]["lr"]
    methods = {"MOLE": tree["methods"]["MOLE"], "uniform": {"method": "uniform"}, "TSV": {"method": "tsv"}}
    tree |= {"methods": methods, "masked": [], "head": {"lr": 5e-3}}
    path = tmp_path / "searched.yaml"
    path.write_text(
        yaml.safe_dump(
            tree | {"search": {"tries": 2, "space": {"lr": [1e-3, 1e-2], "method": {"coefficient": [0.5, 1.0]}}}},
            sort_keys=False,
        )
    )
    return str(path)


def test_settings_are_searched_for_once_with_the_loras_of_the_first_seed(searched, tmp_path):
    study, cells, folder = run(searched, tmp_path / "out")
    mole = [cell for cell in cells if cell.method == "MOLE"]
    assert {cell.search.key for cell in mole} == {mole[0].search.key}
    assert {tuple(cell.search.space) for cell in cells if cell.search} == {("lr",), ("method.coefficient",)}
    assert {cell.method for cell in cells if cell.search} == {"MOLE", "TSV"}
    assert set(mole[0].search.cell.needs) <= {cell.key for cell in cells if cell.seed == 0}
    chosen = folder.row(mole[0].search.key)["chosen"]["lr"]
    assert {folder.row(cell.key)["settings"]["lr"] for cell in mole} == {chosen}
    assert any(
        "2 tries for each method" in note and "MOLE lr" in note for note in summarise(study, cells, folder).notes
    )


def test_a_rate_is_given_or_searched_for(searched):
    with pytest.raises(LamellaError, match=r"methods\.MOLE gives lr, which search\.space\.lr chooses"):
        read_study(searched, ["methods.MOLE.lr=1e-3"])
    with pytest.raises(LamellaError, match="one of the study's seeds"):
        read_study(searched, ["search.seed=1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("reference=nobody", "nobody"),
        ("arms.c.method=uniform", "called 'methods' now"),
        ("methods.uniform.method=null", "does not say which method"),
        ("methods.uniform=null", "leaves out the method that '(reference|masked)' names"),
        ("lora.task=trec", "lora.task follows"),
        ("seeds=[0,0]", "each of them once"),
        ("held_out={MOLE: x}", "different names"),
        ("sauces={}", "sources"),
        ("methods.uniform.sources=[d]", "There is no source 'd'"),
        ("methods.uniform.sources=[]", "must be a list of the study's sources"),
        ("masked=[nobody]", "method for 'masked' 'nobody'"),
        ("masked=[X-LoRA]", "masked names the method X-LoRA"),
        ("masked=[only b]", "masked names the method only b"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(recipe, change, message):
    with pytest.raises(LamellaError, match=message):
        read_study(recipe, [change])
