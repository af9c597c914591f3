"""`python -m studies`: keep studies, and write docs/evidence.md from what is kept."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lamella.errors import LamellaError
from lamella.files import write_atomic
from studies.criteria import section
from studies.keep import keep, load_study, study_names
from studies.page import evidence_page
from studies.similarity import is_similarity, keep_similarity, kept_similarity

PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"


def main(words: list[str] | None = None) -> int:
    """Exit status 1 if the page is not what the kept rows say, 2 if a folder cannot be kept."""
    parser = argparse.ArgumentParser("python -m studies", description=__doc__)
    parser.add_argument("--add", type=Path, action="append", default=[], metavar="FOLDER", help="a study to keep first")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page is another")
    given = parser.parse_args(words)
    try:
        for folder in given.add:
            print(f"Kept: {keep_similarity(folder) if is_similarity(folder) else keep(folder)}")
        studies = [load_study(name) for name in study_names()]
    except LamellaError as error:
        print(error, file=sys.stderr)
        return 2
    page = evidence_page(studies, kept_similarity(), section())
    same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page
    if not given.check:
        write_atomic(PAGE, page)
    run, planned = sum(study.run for study in studies), sum(study.planned for study in studies)
    said = "is what the kept rows say" if same or not given.check else "is not what the kept rows say: `make evidence`"
    print(f"{PAGE.name} {said}; {run} of {planned} cells run.")
    return int(given.check and not same)


if __name__ == "__main__":
    sys.exit(main())
