"""`lamella evidence`: what the kept studies say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import console, print_json


def evidence(
    add: Annotated[
        list[Path] | None, typer.Option(help="Folder of a study to keep first, named as its recipe; may be repeated.")
    ] = None,
    docs: Annotated[Path, typer.Option(help="Folder of evidence.md and results/studies.")] = Path("docs"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit status 1 if the page is another.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Write docs/evidence.md from the studies kept in docs/results/studies: what was run, and what it says.

    Example: lamella evidence --add runs/trec-shapes
    """
    from lamella.errors import LamellaError
    from lamella.files import write_whole
    from lamella.lab.evidence.evidence_page import evidence_page
    from lamella.lab.evidence.kept_studies import keep_study, kept_studies
    from lamella.lab.evidence.similarity_evidence import is_similarity, keep_similarity, kept_similarity

    if not docs.is_dir():
        raise LamellaError(f"There is no folder {docs}. Run this where lamella's docs lie, or name them with --docs.")
    if check and add:
        raise LamellaError("--check writes nothing and --add does. Give one of them.")
    kept, path = docs / "results" / "studies", docs / "evidence.md"
    of_experts = docs / "results" / "similarity"
    for folder in add or []:
        name = keep_similarity(folder, of_experts) if is_similarity(folder) else keep_study(folder, kept)
        console.print(f"Kept: {name}", highlight=False)
    studies = kept_studies(kept)
    page = evidence_page(studies, kept_similarity(of_experts))
    same = path.is_file() and path.read_text(encoding="utf-8") == page
    if not check:
        write_whole(path, page)
    if json:
        cells = {study.name: {"run": study.run, "planned": study.planned} for study in studies}
        print_json({"page": str(path), "unchanged": same, "studies": cells})
    else:
        run, planned = sum(study.run for study in studies), sum(study.planned for study in studies)
        said = "is what the data say" if same or not check else "is not what the data say: run `lamella evidence`"
        console.print(f"{path} {said}; {run} of {planned} cells run.", highlight=False)
    if check and not same:
        raise typer.Exit(1)
