import shutil

import numpy as np
import pandas as pd
import pytest
from studies.keep import keep, load_study, study_names
from studies.overview import evidence_pages
from studies.page import study_page
from tests.lab.tiny_studies import write_study
from tests.studies.left_studies import EXAMPLES, leave_study, write_recipe

import lamella
from lamella.errors import LamellaError
from lamella.lab.allocation import allocate_from
from lamella.lab.runs.trained import load_adapted
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.results import results_table
from lamella.lab.studies.runner import run_cells
from lamella.lab.studies.study import summarise
from studies import criteria
from studies import keep as keeping


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """The project's only study, called 'study', whose recipe a test writes."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.setattr(keeping, "study_names", lambda: ["study"])
    monkeypatch.setattr(keeping, "RECIPES", folder)
    monkeypatch.setattr(criteria, "ROWS", tmp_path / "none")
    return folder / "study.yaml"


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
    (standing,) = found.results

    assert (found.run, found.planned) == (9, 9)
    assert found.machines == ["a processor; torch 2, transformers 5, peft 0"]
    assert (standing.metric, standing.greater_is_better, standing.reference) == ("accuracy", True, "LoRA")
    assert standing.values["tall"] == dict.fromkeys(range(3), 0.9)
    assert {word: own["test"] for word, own in standing.floors.items()} == {"linear": 0.5, "majority": 0.25}
    for method, own in standing.scores.items():
        for seed, scores in own.items():
            assert len(scores) == EXAMPLES
            assert scores.mean() == standing.values[method][seed]
    assert sum(path.stat().st_size for path in kept.iterdir()) < 30_000
    kinds = ["costs.parquet", "examples.parquet", "parquet", "yaml"]
    assert sorted(path.name.removeprefix("study.") for path in kept.iterdir()) == kinds


def test_page_and_report_have_the_same_intervals(study):
    folder, kept = study
    keep(folder, kept)
    (results,) = load_study("study", kept).results

    same, better = results.against_reference

    assert (same.first, better.first) == ("wide", "tall")
    assert (better.significant, same.significant) == (True, False)
    assert (better.seeds, better.examples) == (3, EXAMPLES)
    assert better.interval.difference == pytest.approx(0.3)
    table = results_table([results]).set_index("method")
    assert table.loc["tall", "difference"] == str(better.interval)


def test_the_page_says_what_was_measured(study):
    keep(*study)
    pages = evidence_pages([load_study("study", study[1])], [], [])
    page = pages["evidence/study.md"]

    assert "| [study](evidence/study.md) | Are more experts better? | 9 / 9 |" in pages["evidence.md"]
    assert page.startswith("# study\n\nAre more experts better?\n\nSecond paragraph.\n\n9 of 9 cells run.")
    assert "better than LoRA: tall (+0.300 [" in page
    assert "not significantly different from LoRA: wide (+0.000 [+0.000, +0.000], p 1.000)" in page
    assert "| floor (linear) |  | 0.500 | 0.500 | 0.500 | 0.500 |" in page
    assert "| tall | 3 / 3 | 0.900 | 0.900 | 0.900 | 0.900 | +0.300 [" in page
    assert "| 1,000 |" in page
    assert "of 1 pairs of shapes, 1 differ significantly. wide is worse than tall (-0.300 [" in page
    assert "On a processor; torch 2, transformers 5, peft 0." in page
    assert "*not run*" not in page


def test_what_was_not_run_is_one_row(packaged, tmp_path):
    write_recipe(packaged)
    pages = evidence_pages([load_study("study", tmp_path / "nowhere")], [], [])

    assert "| study | Are more experts better? | *not run* |" in pages["evidence.md"]
    assert "evidence/study.md" not in pages


def test_a_part_of_a_study_is_shown_as_a_part(packaged, tmp_path):
    write_recipe(packaged)
    part = read_study(str(packaged), ["seeds=[0,2]"])
    leave_study(tmp_path / "study", part, {"LoRA": 0.6, "tall": 0.9})
    keep(tmp_path / "study", tmp_path / "kept")
    found = load_study("study", tmp_path / "kept")
    page = study_page(found)

    assert (found.run, found.planned) == (4, 9)
    assert "4 of 9 cells run." in page
    assert "| tall | 2 / 3 | 0.900 |  | 0.900 | 0.900 |" in page
    assert "Not run: wide." in page


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"run": {"epochs": 2}}, "run differs"),
        ({"methods": {"LoRA": {"method": {"name": "lora", "r": 4}}}}, "methods.LoRA differs"),
        ({"seeds": 2}, "seeds differs"),
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
    methods = keeping.study_recipe("study").methods | {"new": {"method": "head"}}
    write_recipe(packaged, methods=methods)

    found = load_study("study", study[1])
    assert (found.run, found.planned) == (9, 12)
    assert "Not run: new." in study_page(found)


def test_what_is_no_finished_study_is_refused(study, tmp_path):
    folder, kept = study
    (folder / "results.parquet").unlink()
    with pytest.raises(LamellaError, match="lamella compare study"):
        keep(folder, kept)
    with pytest.raises(LamellaError, match=r"'other' is not a study here.*: study"):
        keep(tmp_path / "other", kept)
    assert not kept.exists()


def test_a_half_kept_study_is_refused(study):
    keep(*study)
    (study[1] / "study.examples.parquet").unlink()
    with pytest.raises(LamellaError, match=r"lacks study\.examples\.parquet"):
        load_study("study", study[1])


def test_noise_is_compared_by_what_it_takes_away(study):
    folder, kept = study
    cells = keeping.study_recipe("study").cells()
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
    found = losses(kept)

    assert [(kind, strength, one.first) for kind, strength, one in found] == [
        ("embedding", 0.5, "tall"),
        ("embedding", 0.5, "wide"),
    ]
    assert found[0][2].interval.difference == pytest.approx(0.3)
    assert found[0][2].significant
    assert found[1][2].interval.difference == 0
    assert (found[0][2].seeds, found[0][2].examples) == (3, 2)
    shutil.rmtree(folder / "noise")
    keep(folder, kept)
    assert losses(kept) == []


def losses(kept):
    study = load_study("study", kept)
    return study.losses(study.results[0], [("tall", "LoRA"), ("wide", "LoRA")])


def test_the_questions_about_molex_are_answered(packaged, tmp_path):
    policies = ("learned", "random", "self")
    methods = {"LoRA": {"method": "lora"}}
    methods |= {policy: {"method": {"name": "molex", "policy": policy}} for policy in policies}
    grid = write_recipe(packaged, methods=methods)
    leave_study(tmp_path / "study", grid, {"LoRA": 0.4, "learned": 0.7, "random": 0.7})
    cells = [cell for cell in grid.cells() if cell.method != "self"]
    noisy = [(cell.key, "tokens", 0.2, draw, "accuracy", 0.4) for cell in cells for draw in (0, 1)]
    (tmp_path / "study" / "noise" / "tokens").mkdir(parents=True)
    pd.DataFrame(noisy, columns=["run", "noise", "strength", "seed", "metric", "value"]).assign(method="x").to_parquet(
        tmp_path / "study" / "noise" / "tokens" / "robustness.parquet"
    )
    keep(tmp_path / "study", tmp_path / "kept")
    page = study_page(load_study("study", tmp_path / "kept"))

    answers = {part.partition("\n")[0]: part for part in page.split("## ")[1:]}
    beats = answers["Does MoLEx beat LoRA here?"]
    assert "learned is better than LoRA (+0.300 [" in beats
    assert "(accuracy, 3 seeds, 200 test examples) Below the linear floor: LoRA." in beats
    router = answers["Is its learned router better than a random one?"]
    assert "learned and random do not differ significantly (+0.000 [+0.000, +0.000], p 1.000)." in router
    noise = answers["Does it resist noise better?"]
    assert "tokens noise of 0.2: learned loses more than LoRA (+0.300 [+0.300, +0.300]" in noise
    assert "the losses of learned and random do not differ significantly (+0.000" in noise
    cost = answers["What does it cost?"]
    assert "a training step of learned takes 2.00 times LoRA's time, a forward 1.00 at batch 1; it keeps 1.00" in cost
    assert "Which settings of MoLEx matter?" not in answers


def test_a_trained_study_can_be_kept(packaged, bert, questions, tmp_path):
    write_study(packaged, bert, questions, seeds=[0], max_steps=2)
    # whose experts are then shown along the depth
    packaged.write_text(packaged.read_text().replace("reference: LoRA", "reference: MoLA"))
    grid = keeping.study_recipe("study")
    cells, folder = grid.cells(), StudyFolder(tmp_path / "study")
    run_cells(cells, folder)
    table = summarise(grid, cells, folder).results.set_index("method")

    keep(folder.path, tmp_path / "kept")
    found = load_study("study", tmp_path / "kept")

    (standing,) = found.results
    assert (found.run, found.planned) == (4, 4)
    for method, own in standing.values.items():
        assert np.mean(list(own.values())) == table.loc[method, "mean"]
        assert [scores.mean() for scores in standing.scores[method].values()] == pytest.approx(list(own.values()))
    assert table.loc["floor (linear)", "mean"] == standing.floors["linear"]["test"]
    page = study_page(found)
    assert "4 of 4 cells run" in page

    run = folder.run(next(cell.key for cell in cells if cell.method == "MoLA"))
    distances = lamella.redundancy(load_adapted(run)).groupby("layer")[["raw", "normalised"]].mean()
    depth = found.tables["depth"].set_index("layer")
    assert len(depth) == len(distances) > 1
    for measure in ("raw", "normalised"):
        assert depth[measure].tolist() == pytest.approx(distances[measure].tolist())
    assert depth["contribution"].tolist() == pytest.approx(allocate_from(str(run), "contribution").needs)
    assert f"| 0 | {depth.loc[0, 'raw']:.3f} (" in page


def test_every_packaged_study_has_a_place(tmp_path):
    names = study_names()
    assert {"trec-shapes", "molex-trec"} <= set(names)
    assert all(load_study(name, tmp_path).planned for name in names)


def test_where_a_learned_alpha_went_is_kept_and_told(packaged, tmp_path):
    methods = {"MoLEx": {"method": "molex"}, "learned": {"method": {"name": "molex", "alpha_mode": "learned"}}}
    grid = write_recipe(packaged, methods=methods, reference="MoLEx")
    ends = {"alpha_start": 0.95, "alpha_end": 0.85}
    leave_study(tmp_path / "study", grid, {"MoLEx": 0.6, "learned": 0.6}, ends)
    keep(tmp_path / "study", tmp_path / "kept")
    page = study_page(load_study("study", tmp_path / "kept"))
    assert "learned: alpha went from 0.950 to 0.850 (0.850, 0.850, 0.850 by seed)." in page
