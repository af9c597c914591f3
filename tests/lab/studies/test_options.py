"""A study of composition that asks for options, fitted on a few examples of a held-out task."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tests.lab.conftest import shared
from tests.lab.studies.conftest import RUN, cell_of, run

from lamella.errors import LamellaError
from lamella.lab.data import load_backbone, load_task
from lamella.lab.studies.answers import Questions
from lamella.lab.studies.composition import HEAD
from lamella.lab.studies.composition_results import KL, MIXTURE
from lamella.lab.studies.options import option_answers, with_options
from lamella.lab.studies.planning import plan
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.study import summarise


def task(folder, start, answers, size=30):
    """Questions whose answers recur; a third of them have the first answer, the others the rest in turn."""
    folder.mkdir()
    said = [answers[0] if at % 3 == 0 else answers[1 + at % (len(answers) - 1)] for at in range(size)]
    rows = [{"source": f"{start} number {at}?", "target": answer} for at, answer in enumerate(said)]
    for name, part in (("train", rows[:12]), ("validation", rows[12:18]), ("test", rows[18:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return f"file:{folder}"


@pytest.fixture(scope="module")
def option_recipe(llama, tmp_path_factory):
    with shared(tmp_path_factory, "options") as folder:
        path = folder / "options.yaml"
        return str(path) if path.is_file() else write_recipe(path, llama)


def write_recipe(path, llama):
    folder = path.parent
    study = {
        "backbone": llama,
        "answers": "options",
        "sources": {"a": task(folder / "a", "who", ["yes", "no"]), "b": task(folder / "b", "is it", ["no", "yes"])},
        # of several tokens each, the first two alike up to the last one
        "held_out": {"c": f"{task(folder / 'c', 'which', ['( a', '( b', 'none of the two'])}@5"},
        "fitted_on": "c",
        "seeds": [0],
        "rows": 5,
        "test_rows": {"a": 4, "b": 6, "c": 8},
        "run": RUN,
        "lora": {"method": {"r": 2, "target_modules": ["q_proj", "v_proj"]}, "lr": 5e-2},
        "methods": {
            "MOLE": {"method": "mole"},
            "LoRAHub": {"method": {"name": "lorahub", "examples": 5, "evaluations": 6, "max_length": 32}},
            "best LoRA": {"method": {"name": "best", "max_length": 32}},
            "uniform": {"method": "uniform"},
        },
    }
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def ran(option_recipe, tmp_path_factory):
    with shared(tmp_path_factory, "options") as folder:
        return run(option_recipe, folder / "study")


@pytest.fixture(scope="module")
def study(ran):
    return summarise(*ran)


@pytest.fixture(scope="module")
def rows(ran, study):
    return pd.read_parquet(ran[2].path / "results.parquet").set_index(["method", "task", "metric"]).sort_index()


def test_methods_are_fitted_on_the_held_out_examples(ran):
    grid, cells, folder = ran
    assert len(cells) == 8
    for cell in cells:
        assert folder.failure(cell.key) is None
    tasks = {cell.settings.task for cell in cells if cell.method in grid.methods}
    assert tasks == {grid.held_out["c"]}
    assert {cell.settings.task for cell in cells} - tasks == {*grid.sources.values(), grid.union}
    hub = cell_of(cells, "LoRAHub")
    assert set(folder.row(hub.key)["metrics"]["weights"]) == {"a", "b"}
    assert plan(cells, folder).hours == 0


@pytest.mark.parametrize("method", ["MOLE", "a LoRA", HEAD])
def test_options_have_the_probability_of_their_tokens_one_by_one(ran, method):
    grid, cells, folder = ran
    cell = cell_of(cells, method)
    found = pd.read_parquet(folder.answers(cell.key)).set_index(["test", "row"])
    for test, own in Questions(grid.tests, grid.test_rows, "options").loaded().items():
        backbone = load_backbone(grid.backbone, own)
        model = cell.settings.method.load(backbone, own, folder.run(cell.key) / "adapter").eval()
        assert len(own.splits["test"]) == grid.test_rows[test]
        for at, row in enumerate(own.splits["test"]):
            sums = [expected_sum(model, backbone.tokenizer, row["source"], option) for option in own.label_names]
            answer = found.loc[(test, at)]
            assert answer["log_probs"] == pytest.approx(torch.tensor(sums).log_softmax(0).numpy(), abs=1e-5)
            assert own.label_names[int(answer["label"])] == row["target"]


def expected_sum(model, tokenizer, question, option):
    prompt = tokenizer(f"{question}\n")["input_ids"]
    if prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    said = tokenizer(option, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, *said]])
    labels = torch.tensor([[-100] * len(prompt) + said])
    with torch.no_grad():
        logs = model(input_ids=ids, labels=labels).logits[0].double().log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(said))


def test_scores_stand_beside_chance(ran, study, rows):
    grid = ran[0]
    tests = Questions(grid.tests, grid.test_rows, "options").loaded()
    for test, chance in (("a", 1 / 2), ("b", 1 / 2), ("c", 1 / 3), (MIXTURE, 1 / 2)):
        assert rows.loc[("MOLE", test, "accuracy"), "floor_chance"] == pytest.approx(chance)
    answers = list(tests["c"].splits["test"]["target"])
    commonest = max(answers.count(one) for one in set(answers)) / 8
    assert rows.loc[("MOLE", "c", "accuracy"), "floor_majority"] == pytest.approx(commonest)
    parts = [rows.loc[("uniform", test, "accuracy"), "value"] * size for test, size in (("a", 4), ("b", 6))]
    assert rows.loc[("uniform", MIXTURE, "accuracy"), "value"] == pytest.approx(np.sum(parts) / 10)
    assert rows.loc[("a LoRA", "a", KL), "value"] == 0
    assert ("MOLE", "c", KL) not in rows.index
    assert "chance 0.500" in study.summary
    assert "floor (chance)" in set(study.results["method"])
    assert any("5 examples of c, the same for every seed" in note for note in study.notes)
    assert any("sum of the log-probabilities" in note for note in study.notes)


def test_a_task_needs_recurring_answers(tmp_path):
    alone = load_task(task(tmp_path / "alone", "who", ["yes", "yes"]))
    with pytest.raises(LamellaError, match="have 1 different answers"):
        with_options(alone)
    free = load_task(task(tmp_path / "free", "who", [f"word {number}" for number in range(30)], size=90))
    with pytest.raises(LamellaError, match="needs a task with 2 to 26"):
        with_options(free)


def test_an_encoder_has_no_likelihood_of_options(ran, bert, questions):
    grid = ran[0]
    own = Questions(grid.tests, grid.test_rows, "options").loaded()["a"]
    backbone = load_backbone(bert, load_task(questions))
    with pytest.raises(LamellaError, match="needs a decoder"):
        option_answers(backbone.model, backbone, own, max_length=32, batch_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fitted_on=a", "held-out task for 'fitted_on' 'a'"),
        ("test_rows={a: 4}", "must name every source and held-out task: a, b, c"),
        ("test_rows={a: 4, b: 0, c: 2}", "test_rows"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(option_recipe, change, message):
    with pytest.raises(LamellaError, match=message):
        read_study(option_recipe, [change])


def test_other_kinds_have_no_options(questions):
    with pytest.raises(LamellaError, match=r"compares the likelihood of options .* a classification task"):
        Questions({"t": questions}, None, "options").loaded()
