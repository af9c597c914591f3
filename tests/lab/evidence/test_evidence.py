import shutil

import numpy as np
import pandas as pd
import pytest
from tests.lab.evidence.kept_studies import EXAMPLES, leave_study, write_recipe
from tests.lab.tiny_studies import write_study

from lamella.errors import LamellaError
from lamella.lab.evidence import evidence, kept_studies
from lamella.lab.evidence.evidence import keep, load_study, study_names
from lamella.lab.evidence.evidence_page import evidence_page
from lamella.lab.studies.grid import cells_of, read_grid
from lamella.lab.studies.rows import StudyFolder
from lamella.lab.studies.study import summarise
from lamella.lab.studies.workers import work
from lamella.statistics import holm, paired_interval


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """One packaged study, called 'study', whose recipe a test writes."""
    path = tmp_path / "recipe.yaml"
    monkeypatch.setattr(evidence, "study_names", lambda: ["study"])
    monkeypatch.setattr(evidence, "read_grid", lambda name: read_grid(str(path)))
    monkeypatch.setattr(kept_studies, "composition_names", lambda: [])
    return path


@pytest.fixture
def study(packaged, tmp_path):
    """A finished study of LoRA and of two methods, one like it and one better, and where it is kept."""
    grid = write_recipe(packaged)
    leave_study(tmp_path / "study", grid, {"LoRA": 0.6, "wide": 0.6, "tall": 0.9})
    return tmp_path / "study", tmp_path / "kept"


def test_what_is_kept_is_what_the_runs_scored(study):
    folder, kept = study
    assert keep(folder, kept) == "study"
    shutil.rmtree(folder)  # nothing of it is needed any more

    found = load_study("study", kept)
    (standing,) = found.standings

    assert (found.run, found.planned) == (9, 9)
    assert found.machines == ["a processor; torch 2, transformers 5, peft 0"]
    assert (standing.metric, standing.greater_is_better, standing.reference) == ("accuracy", True, "LoRA")
    assert standing.tests["tall"] == dict.fromkeys(range(3), 0.9)
    assert standing.floors == {"linear": 0.5, "majority": 0.25}
    for method, own in standing.examples.items():
        for seed, scores in own.items():
            assert len(scores) == EXAMPLES
            assert scores.mean() == standing.tests[method][seed]
    assert sum(path.stat().st_size for path in kept.iterdir()) < 30_000
    kinds = ["costs.parquet", "examples.parquet", "parquet", "yaml"]
    assert sorted(path.name.removeprefix("study.") for path in kept.iterdir()) == kinds


def test_contrasts_are_paired_and_corrected(study):
    keep(*study)
    (standing,) = load_study("study", study[1]).standings

    same, better = standing.contrasts([("wide", "LoRA"), ("tall", "LoRA")])

    sides = [np.stack([standing.examples[name][seed] for seed in range(3)]) for name in ("tall", "LoRA")]
    alone = paired_interval(*sides, resamples=evidence.RESAMPLES)
    assert better.interval == alone
    assert [same.p_value, better.p_value] == holm([1.0, alone.p_value])
    assert (better.told_apart, same.told_apart) == (True, False)
    assert (better.seeds, better.examples) == (3, EXAMPLES)
    assert better.interval.difference == pytest.approx(0.3)


def test_the_page_says_what_was_measured(study):
    keep(*study)
    page = evidence_page([load_study("study", study[1])])

    assert "| `study` | trec with minilm | 9 / 9 |" in page
    assert "better than LoRA: tall (+0.300 [" in page
    assert "not told apart from LoRA: wide (+0.000 [+0.000, +0.000], p 1.000)" in page
    assert "| floor (linear) |  | 0.500 | 0.500 | 0.500 | 0.500 |" in page
    assert "| tall | 3 / 3 | 0.900 | 0.900 | 0.900 | 0.900 | +0.300 [" in page
    assert "| 1,000 | 2.00 |" in page
    assert "of 1 pairs of shapes, 1 are told apart. wide is worse than tall (-0.300 [" in page
    assert "On a processor; torch 2, transformers 5, peft 0." in page
    assert "not run" not in page.partition("## Run and planned")[2]


def test_a_page_of_nothing_says_not_run(packaged, tmp_path):
    write_recipe(packaged)
    page = evidence_page([load_study("study", tmp_path / "nowhere")])

    assert "| `study` | trec with minilm | *not run* |" in page
    assert "- trec with minilm (`study`): *not run*" in page
    assert "*not run*: LoRA, wide, tall; 3 seeds." in page


def test_a_part_of_a_study_is_shown_as_a_part(packaged, tmp_path):
    write_recipe(packaged)
    part = read_grid(str(packaged), ["seeds=[0,2]"])
    leave_study(tmp_path / "study", part, {"LoRA": 0.6, "tall": 0.9})
    keep(tmp_path / "study", tmp_path / "kept")
    found = load_study("study", tmp_path / "kept")
    page = evidence_page([found])

    assert (found.run, found.planned) == (4, 9)
    assert "| `study` | trec with minilm | 4 / 9 |" in page
    assert "| tall | 2 / 3 | 0.900 | *not run* | 0.900 | 0.900 |" in page
    assert "| wide | 0 / 3 | *not run* | *not run* | *not run* | *not run* |" in page
    assert " wide: *not run*." in page


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"run": {"epochs": 2}}, "run differs"),
        ({"methods": {"LoRA": {"method": {"name": "lora", "r": 4}}}}, "methods.LoRA differs"),
        ({"seeds": 2}, "seed_list differs"),
        ({"tasks": ["movies"]}, "tasks differs"),
    ],
)
def test_a_recipe_changed_since_then_is_refused(study, packaged, changes, named):
    keep(*study)
    write_recipe(packaged, **changes)

    with pytest.raises(LamellaError, match=named):
        load_study("study", study[1])
    with pytest.raises(LamellaError, match=named):
        keep(*study)


def test_a_method_planned_since_then_is_not_run_yet(study, packaged):
    keep(*study)
    methods = evidence.read_grid("study").methods | {"new": {"method": "head"}}
    write_recipe(packaged, methods=methods)

    found = load_study("study", study[1])
    assert (found.run, found.planned) == (9, 12)
    assert "| new | 0 / 3 | *not run* |" in evidence_page([found])


def test_what_is_no_finished_study_is_refused(study, tmp_path):
    folder, kept = study
    (folder / "results.parquet").unlink()
    with pytest.raises(LamellaError, match="lamella compare study"):
        keep(folder, kept)
    with pytest.raises(LamellaError, match=r"'other' is no packaged study.*: study"):
        keep(tmp_path / "other", kept)
    assert not kept.exists()


def test_a_half_kept_study_is_refused(study):
    keep(*study)
    (study[1] / "study.examples.parquet").unlink()
    with pytest.raises(LamellaError, match=r"lacks study\.examples\.parquet"):
        load_study("study", study[1])


def test_noise_is_compared_by_what_it_takes_away(study):
    folder, kept = study
    cells = cells_of(evidence.read_grid("study"))
    left = {"LoRA": 0.5, "wide": 0.5, "tall": 0.5}  # tall loses .4, the others .1
    rows = [
        (cell.key, "mola", "embedding", strength, draw, metric, left[cell.method] + draw / 100 if strength else 0.9)
        for cell in cells
        for strength in (0.0, 0.5)
        for draw in (0, 1)
        for metric in ("accuracy", "macro_f1")
    ]
    (folder / "noise" / "embedding").mkdir(parents=True)
    columns = ["run", "method", "noise", "strength", "seed", "metric", "value"]
    pd.DataFrame(rows, columns=columns).to_parquet(folder / "noise" / "embedding" / "robustness.parquet")
    keep(folder, kept)
    (standing,) = load_study("study", kept).standings

    found = standing.losses([("tall", "LoRA"), ("wide", "LoRA")])

    assert [(kind, strength, one.first) for kind, strength, one in found] == [
        ("embedding", 0.5, "tall"),
        ("embedding", 0.5, "wide"),
    ]
    assert found[0][2].interval.difference == pytest.approx(0.3)
    assert found[0][2].told_apart
    assert found[1][2].interval.difference == 0
    assert (found[0][2].seeds, found[0][2].examples) == (3, 2)
    shutil.rmtree(folder / "noise")
    keep(folder, kept)
    assert load_study("study", kept).standings[0].losses([("tall", "LoRA")]) == []


def test_the_questions_about_molex_are_answered(packaged, tmp_path):
    policies = ("learned", "random", "self")
    methods = {"LoRA": {"method": "lora"}}
    methods |= {policy: {"method": {"name": "molex", "policy": policy}} for policy in policies}
    grid = write_recipe(packaged, methods=methods)
    leave_study(tmp_path / "study", grid, {"LoRA": 0.4, "learned": 0.7, "random": 0.7})
    cells = [cell for cell in cells_of(grid) if cell.method != "self"]
    noisy = [(cell.key, "tokens", 0.2, draw, "accuracy", 0.4) for cell in cells for draw in (0, 1)]
    (tmp_path / "study" / "noise" / "tokens").mkdir(parents=True)
    pd.DataFrame(noisy, columns=["run", "noise", "strength", "seed", "metric", "value"]).assign(method="x").to_parquet(
        tmp_path / "study" / "noise" / "tokens" / "robustness.parquet"
    )
    keep(tmp_path / "study", tmp_path / "kept")
    page = evidence_page([load_study("study", tmp_path / "kept")])

    answers = {part.partition("\n")[0]: part for part in page.split("### ")[1:]}
    beats = answers["Does MoLEx beat LoRA here?"]
    assert "learned is better than LoRA (+0.300 [" in beats
    assert "(accuracy, 3 seeds, 200 test examples) Below the linear floor: LoRA." in beats
    router = answers["Is its learned router better than a random one?"]
    assert "learned and random are not told apart (+0.000 [+0.000, +0.000], p 1.000). self: *not run*." in router
    noise = answers["Does it resist noise better?"]
    assert "tokens noise of 0.2: learned loses more than LoRA (+0.300 [+0.300, +0.300]" in noise
    assert "the losses of learned and random are not told apart (+0.000" in noise
    cost = answers["What does it cost?"]
    assert "a training step of learned takes 2.00 times LoRA's time, a forward 1.00 at batch 1; it keeps 1.00" in cost
    assert "Which of its settings matter?" not in answers


def test_a_trained_study_can_be_kept(packaged, bert, questions, tmp_path):
    write_study(packaged, bert, questions, max_steps=2)
    grid = evidence.read_grid("study")
    cells, folder = cells_of(grid), StudyFolder(tmp_path / "study")
    work(cells, folder)
    table = summarise(grid, cells, folder).results.set_index("method")

    keep(folder.path, tmp_path / "kept")
    found = load_study("study", tmp_path / "kept")

    (standing,) = found.standings
    assert (found.run, found.planned) == (8, 8)
    for method, own in standing.tests.items():
        assert np.mean(list(own.values())) == table.loc[method, "mean"]
        assert [scores.mean() for scores in standing.examples[method].values()] == pytest.approx(list(own.values()))
    assert table.loc["floor (TF-IDF)", "mean"] == standing.floors["linear"]
    assert "8 of 8 cells run" in evidence_page([found])


def test_every_packaged_study_has_a_place(tmp_path):
    names = study_names()
    assert {"trec-shapes", "molex-trec"} <= set(names)
    assert all(load_study(name, tmp_path).planned for name in names)


def test_where_a_learned_alpha_went_is_kept_and_told(packaged, tmp_path):
    methods = {"MoLEx": {"method": "molex"}, "learned": {"method": {"name": "molex", "alpha_mode": "learned"}}}
    grid = write_recipe(packaged, methods=methods, reference="MoLEx")
    ends = {"alpha": {"start": {"a": 0.95, "b": 0.95}, "end": {"a": 0.9, "b": 0.8}}}
    leave_study(tmp_path / "study", grid, {"MoLEx": 0.6, "learned": 0.6}, ends)
    keep(tmp_path / "study", tmp_path / "kept")
    page = evidence_page([load_study("study", tmp_path / "kept")])
    assert "learned: alpha went from 0.950 to 0.850 (0.850, 0.850, 0.850 by seed)." in page
