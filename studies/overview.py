"""docs/evidence.md: how to read what was measured, every claim with its verdict, and the list of studies."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.statistics import RESAMPLES
from studies.claims import NOT_RUN, Kept, claims_table
from studies.criteria import criteria_page
from studies.keep import KeptStudy, purpose
from studies.page import study_page
from studies.probing import KeptProbes, probing_page
from studies.similarity import KeptSimilarity, similarity_page
from studies.tables import markdown

_HEAD = f"""# Evidence

What the authors of the four systems say, and what was found here. `make evidence` writes this page and those it links
from `studies/rows` of the repository; a test fails when they differ. A study is one recipe in
`studies/recipes`, or a packaged one: `lamella compare studies/recipes/NAME.yaml` runs it, and
`python -m studies --add runs/NAME` keeps it here.

## Claims and verdicts

A figure is by how much the claim's side is better, so positive speaks for the claim; square brackets hold 95 %
intervals: paired bootstrap over test examples and seeds, the same draws for all methods of a table, {RESAMPLES:,} of
them. Where the metric is not a mean over examples only seeds are drawn; with few seeds such intervals are too narrow. A
verdict needs p < 0.05, corrected by Holm over all comparisons of this table. What is undecided may still be so: the
study would have told differences above half the interval's width. Models are small (6 to 30 layers), so a verdict is
about them, not about 7 billion parameters."""

_READ = """## The studies

On their pages a *cell* is one training run: a backbone, a task, a method, a seed, which orders the training rows alike
for every method. There p is corrected over the methods of a table, or the comparisons of an answer. The floors are
TF-IDF with a linear model, and the commonest training label; of options, chance and the commonest answer of the tested
rows. Noise is put on the test inputs by `lamella evaluate --noise`, given a study's runs, with -o in its folder
`noise`; what it takes away is the clean score less the noisy one. Parameters include the task head. A step's time is
that of the reference's in one interleaved run of untrained models, with one thread; empty where it was not measured;
[performance](performance.md) says more of cost."""


def evidence_pages(
    studies: Sequence[KeptStudy], similarity: Sequence[KeptSimilarity], probes: Sequence[KeptProbes]
) -> dict[str, str]:
    """All pages as Markdown, by their path in docs: evidence.md, and one in evidence/ for each study that was run."""
    pages = {f"evidence/{study.name}.md": study_page(study) for study in studies if study.run}
    pages["evidence/expert-similarity.md"] = similarity_page(similarity)
    pages["evidence/compression-criteria.md"] = criteria_page()
    pages["evidence/probing.md"] = probing_page(probes)
    kept = Kept(
        {one.name: one for one in studies}, {one.name: one for one in similarity}, {one.name: one for one in probes}
    )
    pages["evidence.md"] = "\n\n".join([_HEAD, claims_table(kept), _READ, _studies(studies)]) + "\n"
    return {path: page for path, page in pages.items() if page}


def _studies(studies: Sequence[KeptStudy]) -> str:
    """A row for each, with what it asks; one that was not run has no page."""
    rows = []
    for study in studies:
        name = f"[{study.name}](evidence/{study.name}.md)" if study.run else study.name
        asks, _, _ = purpose(study.name).partition("\n\n")
        rows.append([name, " ".join(asks.split()), f"{study.run} / {study.planned}" if study.run else NOT_RUN])
    rows.append(["[expert-similarity](evidence/expert-similarity.md)", "Which experts can stand in for which?", ""])
    rows.append(["[compression-criteria](evidence/compression-criteria.md)", "Which experts can go, at what cost?", ""])
    rows.append(["[probing](evidence/probing.md)", "Which layers hold what, and does MoLEx pick them for it?", ""])
    return markdown(["study", "what it asks", "cells run / planned"], rows)
