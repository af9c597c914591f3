import pytest
from studies.__main__ import DOCS
from studies.answers import answers
from studies.keep import ROWS, load_study, study_names
from studies.overview import evidence_pages
from studies.probing import kept_probing
from studies.similarity import kept_similarity


@pytest.mark.heavy  # all intervals of all studies; `.ci/run` asks it
def test_the_pages_are_what_the_kept_rows_say():
    pages = evidence_pages([load_study(name) for name in study_names()], kept_similarity(), kept_probing())
    written = {path: (DOCS / path).read_text(encoding="utf-8") for path in pages if (DOCS / path).is_file()}
    assert written == pages, "run `make evidence`"


def test_nothing_is_kept_that_no_recipe_plans():
    assert {path.name.partition(".")[0] for path in ROWS.glob("*")} <= set(study_names())


def test_a_run_that_learned_nothing_is_told_where_a_mean_hides_it():
    study = load_study("minilm-five-tasks")
    (page,) = (one for one in answers(study).splitlines() if one.startswith("- joint:"))
    assert "better than LoRA: LoRA per task" in page
    assert page.endswith("1 of 3 runs of LoRA give little but the commonest label.")


def test_the_stages_of_a_sequence_are_one_cell():
    study = load_study("minilm-continual")
    assert study.run == study.planned == 4 * 5
