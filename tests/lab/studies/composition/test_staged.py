"""The runs of a study of composition: what rests on what, and that nothing but the deltas differs."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from lamella.errors import LamellaError
from lamella.lab.studies.composition.grid import HEAD, JOINT, read_composition, stages_of
from lamella.lab.studies.composition.planning import plan_stages
from lamella.lab.studies.composition.running import CompositionFolder, folder_of, run_stages


def tensors(folder, cell):
    return load_file(folder.run(cell.key) / "adapter" / "adapter_model.safetensors")


def test_every_cell_is_run_and_is_an_ordinary_run(ran):
    _, stages, folder = ran

    assert [len(cells) for cells in (stages.heads, stages.loras, stages.arms)] == [2, 6, 10]
    for cell in stages.all:
        assert folder.failure(cell.key) is None
        metrics = json.loads((folder.run(cell.key) / "metrics.json").read_text())
        assert metrics["saved_equals_loaded"]["equal"]
        assert metrics["seed"] == cell.seed
        examined = cell.method in ("MOLE", "a LoRA", "b LoRA", JOINT, HEAD)
        assert ("diagnosis" in folder.row(cell.key)) == examined
    untrained = [cell for cell in stages.arms if cell.method in ("uniform", "only a", "only b")]
    for cell in untrained:
        metrics = folder.row(cell.key)["metrics"]
        assert (metrics["trainable_parameters"], metrics["steps"], metrics["train_seconds"]) == (0, 0, 0)
        assert metrics["build_seconds"] > 0
        assert not (folder.run(cell.key) / "checkpoints").exists()


def test_all_of_a_seed_share_one_trained_head_and_train_none(ran):
    _, stages, folder = ran
    for head in stages.heads:
        base = load_file(folder.path / "bases" / head.key / "model.safetensors")
        trained = tensors(folder, head)
        assert torch.equal(base["classifier.weight"], trained["base_model.model.classifier.weight"])
        for cell in (*stages.loras, *stages.arms):
            if cell.seed == head.seed:
                assert Path(cell.settings.model).name == head.key
                assert not [name for name in tensors(folder, cell) if ".classifier." in name and "xlora" not in name]


def test_loras_learn_their_own_rows_and_the_joint_one_all_of_them(ran):
    grid, stages, _ = ran

    assert [cell.method for cell in stages.loras] == ["a LoRA", "b LoRA", JOINT] * 2
    assert {cell.settings.task for cell in stages.loras} == {*grid.sources.values(), grid.union}
    assert {cell.settings.task for cell in stages.arms} == {f"held:{grid.union}"}
    assert all(cell.settings.limit == {"train": 12} for cell in stages.arms)
    assert {cell.method for cell in stages.heads} == {HEAD}


def test_an_arm_composes_the_sources_that_it_names(ran):
    _, stages, folder = ran
    loras = {cell.method: str(folder.run(cell.key)) for cell in stages.loras if cell.seed == 0}
    arms = {cell.method: cell for cell in stages.arms if cell.seed == 0}

    assert arms["uniform"].settings.method.adapters == {"a": loras["a LoRA"], "b": loras["b LoRA"]}
    assert arms["only b"].settings.method.adapters == {"b": loras["b LoRA"]}
    assert arms["only b"].settings.task == arms["uniform"].settings.task
    own, found = (pd.read_parquet(folder.answers(cell.key)) for cell in (stages.loras[1], arms["only b"]))
    for left, right in zip(own["log_probs"], found["log_probs"], strict=True):
        assert right == pytest.approx(left, abs=1e-5)


def test_masked_arms_answer_without_each_of_their_loras(ran):
    _, stages, folder = ran
    arms = {cell.method: cell for cell in stages.arms if cell.seed == 0}
    whole, only = (pd.read_parquet(folder.answers(arms[name].key)) for name in ("MOLE", "only b"))

    for name in ("MOLE", "uniform"):
        masked = pd.read_parquet(folder.masked(arms[name].key))
        assert list(masked.groupby("dropped", sort=False).size().items()) == [("a", len(whole)), ("b", len(whole))]
        # of two LoRAs the other one is left, with all the weight
        without_a = masked[masked["dropped"] == "a"]
        for left, right in zip(only["log_probs"], without_a["log_probs"], strict=True):
            assert right == pytest.approx(left, abs=1e-5)
    assert not folder.masked(arms["X-LoRA"].key).exists()


def test_keys_say_what_a_cell_rests_on_and_not_where_it_lies(ran, recipe, tmp_path):
    grid, stages, _ = ran
    elsewhere = stages_of(grid, folder_of(grid, tmp_path))
    other = read_composition(recipe, ["lora.lr=1e-3"])
    changed = stages_of(other, folder_of(other, tmp_path))

    assert [cell.key for cell in elsewhere.all] == [cell.key for cell in stages.all]
    assert [cell.key for cell in changed.heads] == [cell.key for cell in stages.heads]
    assert not {cell.key for cell in (*changed.loras, *changed.arms)} & {cell.key for cell in stages.all}
    assert len({cell.key for cell in stages.all}) == 18


def test_what_is_done_is_not_done_again(ran, tmp_path, monkeypatch):
    grid, stages, folder = ran
    copy = CompositionFolder(tmp_path / "copy", folder.tests)
    shutil.copytree(folder.path, copy.path)
    arm = stages.arms[1]
    (copy.path / "rows" / f"{arm.key}.json").unlink()  # killed between the end of a run and its row
    copy.answers(arm.key).unlink()

    def untouched(*args, **kwargs):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr("lamella.lab.studies.composition.running.train", untouched)
    run_stages(stages, copy)

    assert copy.finished(arm.key)
    assert copy.answers(arm.key).read_bytes() == folder.answers(arm.key).read_bytes()
    assert plan_stages(grid, stages, copy).hours == 0


def test_what_rests_on_a_failed_cell_fails_and_says_so(recipe, tmp_path):
    grid = read_composition(recipe, ["seeds=[0]", "lora.router_lr=1"])
    folder = folder_of(grid, tmp_path)
    stages = stages_of(grid, folder)

    run_stages(stages, folder)

    assert "no trainable router" in folder.failure(stages.loras[0].key)
    assert all("is no file or folder here" in folder.failure(cell.key) for cell in stages.arms)
    assert folder.finished(stages.heads[0].key)


def test_two_processes_give_the_answers_of_one(ran, tmp_path):
    grid, _, folder = ran
    other = folder_of(grid, tmp_path)
    again = stages_of(grid, other)
    run_stages(again, other, jobs=2)

    for cell in again.all:
        assert other.answers(cell.key).read_bytes() == folder.answers(cell.key).read_bytes()


def test_a_plan_counts_the_time_to_answer(recipe, tmp_path):
    few, many = (read_composition(recipe, [f"test_rows={rows}"]) for rows in (1, 10))
    hours = []
    for grid in (few, many):
        folder = folder_of(grid, tmp_path)
        found = plan_stages(grid, stages_of(grid, folder), folder)
        assert (found.cells, found.done) == (18, 0)
        hours.append(found.hours)
    assert 0 < hours[0] < hours[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("reference=nobody", "nobody"),
        ("arms.uniform.method=null", "says not which method"),
        ("lora.task=trec", "lora.task follows"),
        ("seeds=[0,0]", "each of them once"),
        ("held_out={MOLE: x}", "different names"),
        ("sauces={}", "sources"),
        ("arms.uniform.sources=[d]", "There is no source 'd'"),
        ("arms.uniform.sources=[]", "must be a list of the study's sources"),
        ("masked=[nobody]", "arm for 'masked' 'nobody'"),
        ("masked=[X-LoRA]", "masked names the arm X-LoRA"),
        ("masked=[only b]", "masked names the arm only b"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(recipe, change, message):
    with pytest.raises(LamellaError, match=message):
        read_composition(recipe, [change])
