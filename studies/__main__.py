"""`python -m studies`: keep studies, and write docs/evidence.md and docs/evidence/ from what is kept."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lamella.errors import LamellaError
from lamella.files import write_atomic
from studies.keep import keep, load_study, study_names
from studies.overview import evidence_pages
from studies.probing import is_probing, keep_probing, kept_probing
from studies.similarity import is_similarity, keep_similarity, kept_similarity

DOCS = Path(__file__).parents[1] / "docs"


def main(words: list[str] | None = None) -> int:
    """Exit status 1 if a page is not what the kept rows say, 2 if a folder cannot be kept."""
    parser = argparse.ArgumentParser("python -m studies", description=__doc__)
    parser.add_argument("--add", type=Path, action="append", default=[], metavar="FOLDER", help="a study to keep first")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is another")
    given = parser.parse_args(words)
    try:
        for folder in given.add:
            keeping = keep_similarity if is_similarity(folder) else keep_probing if is_probing(folder) else keep
            print(f"Kept: {keeping(folder)}")
        studies = [load_study(name) for name in study_names()]
    except LamellaError as error:
        print(error, file=sys.stderr)
        return 2
    pages = evidence_pages(studies, kept_similarity(), kept_probing())
    differing = [path for path, page in pages.items() if _text(DOCS / path) != page]
    left = [path for path in sorted((DOCS / "evidence").glob("*.md")) if f"evidence/{path.name}" not in pages]
    if not given.check:
        for path in differing:
            write_atomic(DOCS / path, pages[path])
        for old in left:
            old.unlink()
    run, planned = sum(study.run for study in studies), sum(study.planned for study in studies)
    print(f"{run} of {planned} cells run.")
    if given.check and (differing or left):
        print(f"Not what the kept rows say: {', '.join([*differing, *map(str, left)])}. Run `make evidence`.")
        return 1
    return 0


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
