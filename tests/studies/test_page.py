import pytest
from studies.__main__ import PAGE
from studies.criteria import section
from studies.keep import ROWS, load_study, study_names
from studies.page import evidence_page
from studies.similarity import kept_similarity


@pytest.mark.heavy  # all intervals of all studies; `.ci/run` asks it
def test_the_page_is_what_the_kept_rows_say():
    page = evidence_page([load_study(name) for name in study_names()], kept_similarity(), section())
    assert PAGE.read_text(encoding="utf-8") == page, "run `make evidence`"


def test_nothing_is_kept_that_no_recipe_plans():
    assert {path.name.partition(".")[0] for path in ROWS.glob("*")} <= set(study_names())


def test_a_run_that_learned_nothing_is_told_where_a_mean_hides_it():
    study = load_study("minilm-five-tasks")
    (page,) = (one for one in evidence_page([study]).splitlines() if one.startswith("- joint:"))
    assert "better than LoRA: LoRA per task" in page
    assert page.endswith("1 of 3 runs of LoRA give little but the commonest label.")
