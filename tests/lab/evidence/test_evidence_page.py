from pathlib import Path

from lamella.lab.evidence.evidence import study_names
from lamella.lab.evidence.evidence_page import evidence_page
from lamella.lab.evidence.kept_studies import composition_names, kept_studies
from lamella.lab.evidence.similarity_evidence import kept_similarity

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_is_what_the_kept_studies_say():
    kept = DOCS / "results" / "studies"
    page = evidence_page(kept_studies(kept), kept_similarity(DOCS / "results" / "similarity"))
    assert (DOCS / "evidence.md").read_text(encoding="utf-8") == page, "run `lamella evidence`"


def test_nothing_is_kept_that_no_recipe_plans():
    kept = (DOCS / "results" / "studies").glob("*")
    assert {path.name.partition(".")[0] for path in kept} <= {*study_names(), *composition_names()}
