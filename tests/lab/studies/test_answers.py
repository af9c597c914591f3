"""A study of composition of a language model: losses and divergences, against the models' own logits."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tests.lab.conftest import shared
from tests.lab.studies.conftest import RUN, cell_of, run
from tests.lab.tiny_runs import sentences

from lamella.errors import LamellaError
from lamella.lab.data import encode, load_backbone, load_task
from lamella.lab.methods import method_from
from lamella.lab.studies.answers import Questions
from lamella.lab.studies.composition import HEAD, JOINT
from lamella.lab.studies.composition_results import KL, MIXTURE, PERPLEXITY
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.planning import plan
from lamella.lab.studies.runner import run_cells
from lamella.lab.studies.study import summarise


def task(folder, start, prompted=False):
    """Sentences that begin alike; with a prompt where they answer one."""
    folder.mkdir()
    rows = [{"prompt": f"{start} is", "completion": text} for text in sentences(40, 7)]
    if not prompted:
        rows = [{"text": f"{row['prompt']} {row['completion']}"} for row in rows]
    for name, part in (("train", rows[:20]), ("validation", rows[20:30]), ("test", rows[30:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return f"file:{folder}"


@pytest.fixture(scope="module")
def prose_recipe(llama, tmp_path_factory):
    with shared(tmp_path_factory, "texts") as folder:
        path = folder / "prose.yaml"
        return str(path) if path.is_file() else write_recipe(path, llama)


def write_recipe(path, llama):
    folder = path.parent
    limit = {"train": 8, "validation": 4}
    study = {
        "backbone": llama,
        "answers": "tokens",
        "sources": {"a.b": task(folder / "a", "who"), "talk": task(folder / "b", "where", prompted=True)},
        "held_out": {"c": task(folder / "c", "then")},
        "seeds": [0],
        "test_rows": 6,
        "run": RUN,
        "lora": {"method": {"r": 2, "target_modules": ["q_proj", "v_proj"]}, "lr": 5e-2},
        "methods": {
            "MOLE": {"method": "mole", "limit": limit},
            "uniform": {"method": "uniform", "limit": limit},
            "only talk": {"method": {"name": "single", "adapter": "talk"}, "limit": limit},
        },
    }
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def ran(prose_recipe, tmp_path_factory):
    with shared(tmp_path_factory, "texts") as folder:
        return run(prose_recipe, folder / "study")


@pytest.fixture(scope="module")
def study(ran):
    return summarise(*ran)


@pytest.fixture(scope="module")
def rows(ran, study):
    return pd.read_parquet(ran[2].path / "results.parquet").set_index(["method", "task", "metric"]).sort_index()


def log_probs_of(cells, folder, method, test, text):
    """Log-probabilities of the tokens that carry loss, and these tokens, of one text by itself."""
    cell = cell_of(cells, method)
    own = load_task(test)
    backbone = load_backbone(cell.settings.model, own)
    model = cell.settings.method.load(backbone, own, folder.run(cell.key) / "adapter").eval()
    row = encode(own, backbone.tokenizer, max_length=32, decoder=True).test[text]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    with torch.no_grad():
        logits = model(input_ids=ids, labels=labels).logits
    read = labels[0, 1:] != -100
    return logits[0, :-1][read].double().log_softmax(-1), labels[0, 1:][read]


def test_every_cell_runs_on_the_backbone_itself(ran):
    grid, cells, folder = ran
    assert len(cells) == 7
    for cell in cells:
        assert folder.failure(cell.key) is None
        assert folder.finished(cell.last)
        assert cell.settings.model == grid.backbone
    assert not (folder.path / "bases").exists()
    assert folder.row(cells[0].key)["metrics"]["trainable_parameters"] == 0
    assert plan(cells, folder).hours == 0


def test_what_is_run_again_answers_again(ran, tmp_path):
    _, cells, folder = ran
    copy = StudyFolder(tmp_path / "copy")
    shutil.copytree(folder.path, copy.path)
    cell = cells[0]
    first = copy.answers(cell.key).read_bytes()
    copy.answers(cell.key).write_bytes(b"stale")

    copy.begin([cell], force=True)
    run_cells(cells, copy)

    assert copy.finished(cell.last)
    assert copy.answers(cell.key).read_bytes() == first


@pytest.mark.parametrize("method", ["MOLE", "talk LoRA", HEAD])
def test_losses_and_divergences_are_those_of_each_text_by_itself(ran, method):
    grid, cells, folder = ran
    cell = cell_of(cells, method)
    found = pd.read_parquet(folder.answers(cell.key)).set_index(["test", "row"])
    tested = Questions(grid.tests, grid.test_rows, "tokens").loaded()
    for test, place in grid.tests.items():
        whole = load_task(place).splits["test"]
        column = "text" if "text" in whole.column_names else "completion"
        for at, text in enumerate(tested[test].splits["test"][column]):
            index = whole[column].index(text)
            logs, said = log_probs_of(cells, folder, method, place, index)
            answer = found.loc[(test, at)]
            assert answer["loss"] == pytest.approx(-logs[range(len(said)), said].mean().item(), abs=1e-5)
            if test not in grid.sources:
                assert np.isnan(answer["kl"])
                continue
            alone, _ = log_probs_of(cells, folder, f"{test} LoRA", place, index)
            expected = sum(float((one.exp() * (one - other)).sum()) for one, other in zip(alone, logs, strict=True))
            assert answer["kl"] == pytest.approx(expected / len(said), abs=1e-5)


def test_without_a_lora_it_is_the_backbone_as_it_is(ran):
    grid, cells, folder = ran
    tested = Questions(grid.tests, grid.test_rows, "tokens").loaded()["c"]
    backbone = load_backbone(grid.backbone, tested)
    found = pd.read_parquet(folder.answers(cells[0].key))
    for text, answer in zip(tested.splits["test"]["text"], found[found["test"] == "c"]["loss"], strict=True):
        ids = torch.tensor([encode_one(text, backbone.tokenizer)])
        with torch.no_grad():
            assert answer == pytest.approx(backbone.model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)


def encode_one(text, tokenizer):
    ids = tokenizer(text)["input_ids"]
    return ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def test_a_backbone_without_a_head_of_its_own_is_not_scored_bare(bert, questions):
    own = load_task(questions)
    with pytest.raises(LamellaError, match="'bare' trains no task head"):
        method_from("bare").build(load_backbone(bert, own), own)


def test_what_is_kept_of_the_own_lora_is_all_of_it(rows):
    for method in ("talk LoRA", "only talk"):
        assert rows.loc[(method, "talk", KL), "value"] == pytest.approx(0, abs=1e-6)
        assert rows.loc[(method, "talk", "loss over own LoRA"), "value"] == pytest.approx(0, abs=1e-6)
        assert rows.loc[(method, "a.b", KL), "value"] > 1e-4
    assert ("MOLE", "c", KL) not in rows.index


def test_perplexity_and_the_mixture_follow_from_the_losses(rows):
    for method in ("MOLE", "uniform", JOINT, HEAD):
        parts = [rows.loc[(method, test, "loss"), "value"] for test in ("a.b", "talk")]
        assert rows.loc[(method, MIXTURE, "loss"), "value"] == pytest.approx(np.mean(parts))
        assert rows.loc[(method, MIXTURE, PERPLEXITY), "value"] == pytest.approx(np.exp(np.mean(parts)))
    assert not rows["greater_is_better"].any()
    assert rows["floor_linear"].isna().all()


def test_the_study_speaks_of_loss(study, rows):
    assert study.not_run == []
    assert study.summary.startswith("On mixture with ")
    assert " 1 seed(s)." in study.summary
    assert any("is the backbone as it is" in note for note in study.notes)
    assert "floor" not in " ".join(study.results["method"])
    (said,) = [note for note in study.notes if note.startswith("Perplexity on the mixture")]
    assert f"MOLE {rows.loc[('MOLE', MIXTURE, PERPLEXITY), 'value']:.1f}, " in said


def test_tests_that_cannot_be_asked_so_are_refused(ran, questions):
    with pytest.raises(LamellaError, match=r"compares the loss of texts .* a classification task"):
        Questions({"t": questions}, None, "tokens").loaded()
    with pytest.raises(LamellaError, match=r"compares the probabilities of classes .* a causal-lm task"):
        Questions(ran[0].tests, None, "classes").loaded()
