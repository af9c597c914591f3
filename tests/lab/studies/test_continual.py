import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from peft import load_peft_weights
from tests.lab.conftest import once
from tests.lab.tiny_studies import RUN

from lamella.errors import LamellaError
from lamella.lab.report.continual import forgetting_section
from lamella.lab.runs.settings import settings_of
from lamella.lab.studies.checks import check_rows
from lamella.lab.studies.continual import curves
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.forgetting import backward_transfer, overall_performance
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.runner import run_cells
from lamella.lab.studies.study import summarise

METHODS = {
    "growing": {"method": {"name": "mola-growing", "r": 2, "num_experts": "1-2", "top_k": 1}},
    "MOLE": {"method": "mole", "loras": {"name": "lora", "r": 2}, "rehearsed": 4},
}


def recipe(bert, questions, pairs, **changes):
    study = {
        "backbone": bert,
        "sequence": [questions, pairs],
        "seeds": 1,
        "run": RUN | {"max_steps": 2, "keep": "last"},
    }
    return study | {"methods": METHODS} | changes


def carried_out(folder, bert, questions, pairs, methods):
    folder.mkdir()
    tree = recipe(bert, questions, pairs, methods=methods)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    continual, place = read_study(str(folder / "recipe.yaml")), StudyFolder(folder / "out")
    cells = continual.cells()
    place.begin(cells)
    run_cells(cells, place)


@pytest.fixture(scope="session")
def study(bert, questions, pairs, tmp_path_factory):
    """Two tasks one after the other, by MoLA that grows."""
    methods = {"growing": METHODS["growing"]}
    folder = once(tmp_path_factory, "continual", lambda path: carried_out(path, bert, questions, pairs, methods))
    return read_study(str(folder / "recipe.yaml")), StudyFolder(folder / "out")


def test_stages_go_on_from_the_stage_before(bert, questions, pairs, tmp_path):
    changes = {"orders": [[pairs, questions]], "seeds": [4, 5], "methods": {"LoRA": {"method": "lora"}, **METHODS}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(bert, questions, pairs, **changes), sort_keys=False))
    continual = read_study(str(tmp_path / "recipe.yaml"))
    cells = continual.cells()

    assert continual.runs == [((questions, pairs), 4), ((questions, pairs), 5), ((pairs, questions), 4)]
    assert len(cells) == 3 * (2 + 2 + 4)
    first, second = [cell for cell in cells if cell.method == "LoRA" and cell.run == 0]
    assert first.settings.task == f"learn:1:{questions}+{pairs}"
    assert (first.settings.start, second.settings.start) == (None, f"lora:{first.key}")
    assert second.needs == [first.key]
    *alone, one, both = [cell for cell in cells if cell.method.startswith("MOLE") and cell.run == 0]
    assert one.key == alone[0].key
    assert both.settings.task == f"learn:2/4:{questions}+{pairs}"
    assert sorted(both.needs) == sorted(cell.key for cell in alone)


def test_what_was_measured_follows_from_the_runs(study, questions, pairs):
    continual, place = study
    cells = continual.cells()
    check_rows(cells, place)
    found = summarise(continual, cells, place)

    assert found.not_run == []
    stages = curves(place)
    for method in continual.methods:
        own = stages[stages["method"] == method].pivot_table(index="stage", columns="place", values="accuracy")
        tested = [place.row(cell.key)["metrics"]["test"] for cell in cells if cell.method == method]
        matrix = np.array([[one[f"{task}/accuracy"] for task in (questions, pairs)] for one in tested])
        assert np.array_equal(own.to_numpy(), matrix)
        results = pd.read_parquet(place.path / "results.parquet").set_index(["method", "metric"])["value"]
        assert results[method, "OP"] == overall_performance(matrix)
        assert results[method, "BWT"] == backward_transfer(matrix)
    examples = pd.read_parquet(place.path / "examples.parquet").set_index(["method", "metric"])
    scores, strata = examples.loc[("growing", "BWT"), ["scores", "strata"]]
    parts = np.split(scores, np.cumsum(strata)[:-1])
    assert np.mean([part.mean() for part in parts]) == pytest.approx(results["growing", "BWT"])
    assert "Accuracy on the task learned first" in forgetting_section(SimpleNamespace(about=found))


@pytest.mark.heavy
def test_loras_of_the_tasks_so_far_are_composed_at_every_stage(bert, questions, pairs, tmp_path):
    carried_out(tmp_path / "study", bert, questions, pairs, {"MOLE": METHODS["MOLE"]})
    continual, place = read_study(str(tmp_path / "study" / "recipe.yaml")), StudyFolder(tmp_path / "study" / "out")

    assert summarise(continual, continual.cells(), place).not_run == []
    assert len(curves(place)) == 4


def test_earlier_experts_and_heads_stay_as_they_were(study):
    continual, place = study
    one, two = [place.run(cell.key) for cell in continual.cells() if cell.method == "growing"]
    before, after = load_peft_weights(str(one / "adapter")), load_peft_weights(str(two / "adapter"))

    grown = [name for name in before if before[name].shape != after[name].shape]
    assert grown
    assert all("lamella_mola" in name for name in grown)
    for name in grown:
        assert len(after[name]) == 2 * len(before[name])
        assert torch.equal(after[name][: len(before[name])], before[name])
    assert any(after[name][len(before[name]) :].abs().sum() > 0 for name in grown if "lora_B" in name)
    (head,) = [name for name in before if name.endswith("classifier.weight")]
    assert torch.equal(after[head][:2], before[head][:2])
    assert not torch.equal(after[head][2:], before[head][2:])
    assert settings_of(two).start == str(one)


def test_recipes_that_do_not_fit_are_refused(bert, questions, pairs, tmp_path):
    def read(**changes):
        (tmp_path / "bad.yaml").write_text(json.dumps(recipe(bert, questions, pairs, **changes)))
        return read_study(str(tmp_path / "bad.yaml"))

    with pytest.raises(LamellaError, match="not the tasks of the sequence"):
        read(orders=[[questions]])
    with pytest.raises(LamellaError, match="belong together"):
        read(methods={"MOLE": {"method": "mole", "rehearsed": 4}})
    with pytest.raises(LamellaError, match="has no row of the earlier ones"):
        read(methods={"MOLE": {"method": "mole", "loras": "lora"}})
    with pytest.raises(LamellaError, match=r"methods.LoRA.rehearse'"):
        read(methods={"LoRA": {"method": "lora", "rehearse": 4}})
    for decay in ("weight_decay", "router_weight_decay"):
        with pytest.raises(LamellaError, match="weight decay would change"):
            read(methods={"growing": {"method": "mola-growing", decay: 0.1}})
        with pytest.raises(LamellaError, match="weight decay would change"):
            read(methods={"growing": {"method": "mola-growing"}}, run=RUN | {decay: 0.1})
    with pytest.raises(LamellaError, match=r"sequence has 'mix:.*cannot hold a name with '\+'"):
        read(sequence=[f"mix:{questions}+{pairs}", questions])
    with pytest.raises(LamellaError, match=r"method is \[1\]. Write a name"):
        read(methods={"LoRA": {"method": [1]}})
    with pytest.raises(LamellaError, match="num_experts='some' is not a shape"):
        read(methods={"growing": {"method": {"name": "mola-growing", "num_experts": "some"}}})
