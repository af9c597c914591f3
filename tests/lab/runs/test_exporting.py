import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.lab.tiny_runs import MOLA

from lamella.errors import LamellaError
from lamella.lab.data import load_backbone, load_task
from lamella.lab.runs.exporting import export_as_experts, export_collapsed
from lamella.lab.runs.trained import find_trained, load_trained


@pytest.fixture(scope="module")
def run(finished_run) -> Path:
    return finished_run(MOLA).folder.path


def test_each_expert_loads_with_peft_alone(run, bert, questions, tmp_path):
    made = export_as_experts(run, tmp_path / "experts")

    assert [path.name for path in made.adapters] == ["expert_0", "expert_1", "expert_2", "expert_3"]
    for path in made.adapters:
        PeftModel.from_pretrained(load_backbone(bert, load_task(questions)).model, path)
        assert json.loads((path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_collapsed_lora_says_what_it_lost(run, bert, questions, tmp_path):
    made = export_collapsed(run, tmp_path / "lora", rows=48)

    stored = json.loads((tmp_path / "lora" / "error.json").read_text())
    assert stored == made.error
    assert 0 <= stored["error"] < 1
    assert stored["held_out"] is False
    assert stored["rows"] == 48
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert f"{stored['error']:.2%}" in (tmp_path / "lora" / "README.md").read_text()

    mixture = load_trained(run)
    rows, encoded = mixture.rows("test", 8)
    batch = encoded.collator([rows[i] for i in range(8)])
    plain = PeftModel.from_pretrained(load_backbone(bert, load_task(questions)).model, tmp_path / "lora").eval()
    with torch.no_grad():
        ours, theirs = mixture.model(**batch).logits, plain(**batch).logits
        with mixture.model.disable_adapter():
            base = mixture.model(**batch).logits
    assert (ours - theirs).norm() < (ours - base).norm()


def test_the_export_names_the_base_as_the_run_did(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "owner/model"}))

    export_collapsed(tmp_path / "run", tmp_path / "lora", rows=16)
    export_as_experts(tmp_path / "run", tmp_path / "experts")

    for folder in (tmp_path / "lora", tmp_path / "experts" / "expert_0"):
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/model"
    assert "base_model: owner/model" in (tmp_path / "lora" / "README.md").read_text()


def test_the_error_does_not_depend_on_the_random_head_of_the_base(run, tmp_path):
    errors = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        errors.append(export_collapsed(run, tmp_path / str(seed), rows=16).error["error"])

    assert errors[0] == errors[1]


def test_a_smaller_rank_loses_more(run, tmp_path):
    whole = export_collapsed(run, tmp_path / "whole", rows=48).error
    small = export_collapsed(run, tmp_path / "small", rows=48, rank=1).error

    assert small["error"] > whole["error"]
    assert small["rank"] == 1


def test_nothing_is_left_where_it_fails(run, tmp_path, monkeypatch):
    def broken(*_):
        raise LamellaError("no")

    monkeypatch.setattr("lamella.lab.runs.exporting._card", broken)
    with pytest.raises(LamellaError):
        export_collapsed(run, tmp_path / "out" / "lora", rows=16)

    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("export", [export_as_experts, export_collapsed])
def test_nothing_is_overwritten(run, tmp_path, export):
    (tmp_path / "there").mkdir()
    with pytest.raises(LamellaError, match="exists already"):
        export(run, tmp_path / "there")


def test_an_adapter_in_a_run_knows_its_run(run):
    assert find_trained(run / "adapter") == find_trained(run)


def test_a_lora_has_no_experts(finished_run, tmp_path):
    with pytest.raises(LamellaError, match="no experts to export"):
        export_as_experts(finished_run("lora").folder.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lone_adapter_needs_a_task_to_collapse(run, bert, questions, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "lone")
    with pytest.raises(LamellaError, match="--task"):
        export_collapsed(tmp_path / "lone", tmp_path / "out")

    assert export_collapsed(tmp_path / "lone", tmp_path / "out", task=questions, rows=16).error
    assert len(export_as_experts(tmp_path / "lone", tmp_path / "experts", base=bert).adapters) == 4


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(LamellaError, match="neither an adapter"):
        find_trained(tmp_path)
    with pytest.raises(LamellaError, match="no folder"):
        find_trained(tmp_path / "nowhere")
