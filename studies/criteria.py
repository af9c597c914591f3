"""`python -m studies.criteria`: which criterion leaves the best smaller model; kept rows, and the table made from them.

A model is calibrated on some of its domains and measured on all, with several samples of text. A cell is one sample,
one criterion and one scope, with a refit or not, at three budgets. It is on disk once; a call goes on with the rest.
What `compress` does if nothing is asked for was chosen by the cells on validation documents; those on test documents
say what the choice is worth.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from lamella.backbones.modes import evaluating
from lamella.backbones.moe import moe_layers
from lamella.files import write_atomic
from lamella.lab.data import load_backbone, load_task
from lamella.similarity import Capture, capture, text_batches
from lamella.similarity.compression.budget import Scope
from lamella.similarity.compression.calibration import LayerSample, layer_gradients
from lamella.similarity.compression.compressed import DEFAULT, Report, Settings, compress_each
from lamella.similarity.compression.criteria import CRITERIA, Ranking, find_criterion
from lamella.similarity.compression.distillation import distil_routers
from lamella.similarity.compression.perplexity import score
from lamella.similarity.compression.refit import RIDGE, refit
from lamella.similarity.swapping.scores import Batch, TextScores
from lamella.statistics import ENDS
from studies.tables import markdown

ROWS = Path(__file__).parent / "criteria_rows"
BUDGETS = (0.875, 0.75, 0.5)
INSIDE, OUTSIDE = ("news", "technical"), ("dialogue", "glosses")  # calibrated on, and not
NAMES = (*INSIDE, *OUTSIDE)
_TRAIN = 640  # documents of each domain, to draw from
_DOCUMENTS = {"news": 12, "technical": 24, "dialogue": 60, "glosses": 60}  # to measure on; those of the last are short
_PUBLISHED = ("reap", "hc-smoe", "frequency", "random")  # each layer loses as many, nothing is fitted
_SCOPES: tuple[Scope, ...] = ("model", "layer")
_CANDIDATES = ("man", "energy", "reconstruction", "hc-smoe")
_RIDGES = (0, 0.1, 0.3)
_DRAWS = 2000

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Subject:
    """A model, and how much text and how many samples of it there is time for.

    Attributes:
        seeds: samples of text for what is compared with the default.
        others: for all other criteria.
        criteria: that are measured at all.
        dtype: of the model.
        tokens: of each domain that is calibrated on.
        per_expert: tokens that a capture keeps of each.
        documents: share of the documents to measure on.
    """

    seeds: Sequence[int] = (0, 1, 2)
    others: Sequence[int] = (0,)
    criteria: Sequence[str] = tuple(CRITERIA)
    dtype: str = "float32"
    tokens: int = 12_000
    per_expert: int = 1024
    documents: float = 1.0


SUBJECTS = {
    "tiny-moe": Subject(others=(0, 1, 2)),
    "deep-moe": Subject(documents=0.5),
    "smollm2-experts": Subject((0,), (), (), "bfloat16", 3000, 256, 0.5),
}


@dataclass(frozen=True)
class Cell:
    """One sample of text, one criterion, one scope, what follows, and where it is measured.

    Attributes:
        seed: of the sample.
        criterion, scope: of ``compress``.
        ridge: of the refit; 0 for none.
        distil: passes in which routers learn.
        split: of the documents to measure on.
    """

    seed: int
    criterion: str
    scope: Scope
    ridge: float = RIDGE
    distil: int = 0
    split: Split = "test"

    @property
    def file(self) -> str:
        """Its rows."""
        return f"{self.split}-{self.seed}-{self.scope}-{self.criterion}-{self.ridge:g}-{self.distil}.json"


def cells(subject: Subject) -> Iterator[Cell]:
    """All of them: the default beside what was published, what it was chosen by, and all other criteria."""
    if subject.others:
        yield from (Cell(0, "reap", scope, ridge, split="validation") for scope in _SCOPES for ridge in _RIDGES)
    for seed in subject.seeds:
        yield Cell(seed, DEFAULT, "model")
        yield Cell(seed, "reap", "layer")
        yield from (Cell(seed, name, "layer", 0) for name in _PUBLISHED)
    yield from (Cell(seed, "reap", "layer", distil=1) for seed in subject.seeds)
    for name in _CANDIDATES if subject.others else ():
        yield Cell(0, name, "model", split="validation")
    for seed, scope, name in product(subject.others, _SCOPES, subject.criteria):
        yield Cell(seed, name, scope)


def run(model: str, folder: str, work: Path) -> None:
    """Runs what is not done yet; a cell is a file in ``work``, beside the captures."""
    subject = SUBJECTS[model]
    backbone = load_backbone(folder, dtype=subject.dtype)
    network, tokenizer = backbone.model.eval(), backbone.tokenizer
    work.mkdir(parents=True, exist_ok=True)
    for line in _kept(model):  # what was measured elsewhere is not measured again
        if not _is_former(row := json.loads(line)):
            (work / _cell(row).file).write_text(line, encoding="utf-8")
    held: dict[str, dict[str, list[Batch]]] = {}
    whole: dict[str, dict[str, TextScores]] = {}
    samples: dict[int, _Calibrated] = {}
    for cell in dict.fromkeys(cells(subject)):
        if (work / cell.file).exists():
            continue
        if cell.split not in held:
            held[cell.split] = {name: _held_out(name, tokenizer, cell.split, subject) for name in NAMES}
            whole[cell.split] = score(network, held[cell.split])
        if cell.seed not in samples:
            texts = [batch for name in INSIDE for batch in _calibration(name, tokenizer, cell.seed, subject.tokens)]
            place = work / f"capture-{cell.seed}"
            taken = capture(network, texts, place, per_expert=subject.per_expert, seed=cell.seed)
            samples[cell.seed] = _Calibrated.on(network, taken, texts)
        before = whole[cell.split]
        tokens = {name: before[name].weights.tolist() for name in NAMES}
        rows, shown = [], []
        for small, report in samples[cell.seed].smaller(cell):
            after = score(small, held[cell.split])
            nats = {name: (after[name].sums - before[name].sums).round(3).tolist() for name in NAMES}
            rows.append({"budget": report.budget, "parameters": report.parameters, "nats": nats})
            shown.append(f"{_ratio(nats, tokens, INSIDE):.3f}/{_ratio(nats, tokens, OUTSIDE):.3f}")
        write_atomic(work / cell.file, json.dumps({**asdict(cell), "tokens": tokens, "rows": rows}))
        print(cell.file, *shown, flush=True)


@dataclass(frozen=True)
class _Calibrated:
    """A model, and what is the same for all cells of one sample of text."""

    network: PreTrainedModel
    taken: Capture
    samples: Mapping[int, LayerSample]
    gradients: Mapping[int, float]
    texts: Sequence[Batch]

    @classmethod
    def on(cls, network: PreTrainedModel, taken: Capture, texts: Sequence[Batch]) -> _Calibrated:
        layers = moe_layers(network)
        samples = {layer.index: LayerSample.of(layer, taken) for layer in layers}
        return cls(network, taken, samples, layer_gradients(network, layers, texts), texts)

    def smaller(self, cell: Cell) -> Iterator[tuple[PreTrainedModel, Report]]:
        """The smaller model of each budget, finished as the cell says."""
        rank = find_criterion(cell.criterion).rank
        with evaluating(self.network):
            ranked: dict[int, Ranking] = {index: rank(sample, cell.seed) for index, sample in self.samples.items()}
        settings = Settings(cell.criterion, cell.scope, refit=False, distil=0, seed=cell.seed)
        each = compress_each(self.network, self.taken, BUDGETS, settings, self.texts, ranked, self.gradients)
        for small in each:
            changed = {index for index, _ in small.report.gone} if cell.ridge else ()
            with evaluating(self.network):
                for layer in moe_layers(small.model):
                    if layer.index in changed:
                        refit(self.samples[layer.index], layer, cell.ridge)
            if cell.distil:
                distil_routers(small.model, self.network, self.texts, cell.distil)
            yield small.model, small.report


def _held_out(name: str, tokenizer: Any, split: Split, subject: Subject) -> list[Batch]:
    """The first documents of a domain's split."""
    wanted = round(_DOCUMENTS[name] * subject.documents)
    batches = text_batches(load_task(name), tokenizer, split, 256, 12, wanted)
    return [{key: tensor for key, tensor in batch.items() if key != "rows"} for batch in batches]


def _calibration(name: str, tokenizer: Any, seed: int, tokens: int) -> list[Batch]:
    """Documents of a domain's training split, drawn by the seed, until they hold so many tokens."""
    batches = list(text_batches(load_task(name), tokenizer, "train", 256, 16, _TRAIN))
    drawn: list[Batch] = []
    held = 0
    for at in np.random.default_rng(seed).permutation(len(batches)):
        if held < tokens:
            drawn.append({key: tensor for key, tensor in batches[at].items() if key != "rows"})
            held += int(batches[at]["attention_mask"].sum())
    return drawn


def _ratio(nats: Mapping[str, Sequence[float]], tokens: Mapping[str, Sequence[float]], names: Sequence[str]) -> float:
    """The geometric mean over domains of the smaller model's perplexity over the whole one's."""
    return math.exp(sum(sum(nats[name]) / sum(tokens[name]) for name in names) / len(names))


def keep(model: str, work: Path) -> None:
    """Copies what was measured into the folder of kept rows, one line a cell."""
    ROWS.mkdir(exist_ok=True)
    every = [work / cell.file for cell in dict.fromkeys(cells(SUBJECTS[model]))]
    done = [path.read_text(encoding="utf-8") for path in every if path.exists()]
    known = {_cell(json.loads(line)) for line in done}
    done += [line for line in _kept(model) if _is_former(row := json.loads(line)) and _cell(row) not in known]
    with gzip.GzipFile(ROWS / f"{model}.jsonl.gz", "wb", mtime=0) as file:
        file.write("\n".join(done).encode())


def _kept(model: str) -> list[str]:
    """The kept rows, a line of JSON for each cell."""
    path = ROWS / f"{model}.jsonl.gz"
    return gzip.decompress(path.read_bytes()).decode().splitlines() if path.exists() else []


def _is_former(row: Mapping[str, Any]) -> bool:
    """Whether a row is of the refit's former sums, over the text, so that it cannot be measured again."""
    return row["ridge"] > 0 and "distil" not in row


def _cell(row: Mapping[str, Any]) -> Cell:
    """The cell of a row; of a former one, that which takes its place."""
    named = {field.name: row[field.name] for field in fields(Cell) if field.name in row}
    return Cell(**named | ({"ridge": RIDGE} if _is_former(row) else {}))


def criteria_page() -> str:
    """Docs/evidence/compression-criteria.md, as Markdown; empty where nothing is kept."""
    kept = [model for model in SUBJECTS if _kept(model)]
    if not kept:
        return ""
    chosen = [f"### {model}\n\n{table(model, 'validation')}" for model in kept if SUBJECTS[model].others]
    tables = [f"## {model}\n\n{table(model)}" for model in kept]
    head = "# Which criterion leaves the best smaller model?"
    return "\n\n".join([head, _INTRODUCTION, *tables, "## How the default was chosen", _CHOICE, *chosen]) + "\n"


_INTRODUCTION = """\
Perplexity of the smaller model over the whole one's, geometric mean of two domains that the experts were chosen on
(in) and of two they were not (out), test documents; 95 % intervals over samples of the calibration text and documents,
over documents alone where there is one sample. Each layer gives up its share, or the cheapest experts of all layers go,
costs weighted by the layers' gradients. The first rows have the default (`reap`, over the model, then the refit) beside
what was published: each layer gives up as many, and nothing is fitted. `python -m studies.criteria MODEL` measures what
is missing; `make models` builds deep-moe and smollm2-experts, the latter here with `blocks=48 held_out_blocks=4` and
measured with one sample and the first rows alone, as it is slow. Rows marked *former* are of the refit as it was, its
sums over the text where they are over the sample now; what they compare is finished alike."""
_CHOICE = """\
By these rows, on validation documents and one sample, with the ridge of the refit."""


def table(model: str, split: Split = "test") -> str:
    """The kept rows of a model as a Markdown table, with intervals over samples of text and documents."""
    cells_of: dict[tuple[str, str, str], list[Any]] = {}
    for row in map(json.loads, _kept(model)):
        if row["split"] == split:
            cells_of.setdefault((row["scope"], row["criterion"], _finish(row)), []).append(row)
    rows = []
    for (scope, name, finish), samples in cells_of.items():
        shown = [_ratio_over(samples, at, names) for at in range(len(BUDGETS)) for names in (INSIDE, OUTSIDE)]
        rows.append([scope, name, finish, len(samples), *shown])
    heads = [f"{1 - budget:.1%} fewer, {where}" for budget in BUDGETS for where in ("in", "out")]
    return markdown(["scope", "criterion", "then", "samples", *heads], rows)


def _finish(row: Mapping[str, Any]) -> str:
    fitted = [f"refit {row['ridge']:g}" + (" (former)" if _is_former(row) else "")] if row["ridge"] else []
    return ", ".join([*fitted, *(["distilled"] if row.get("distil") else [])])


@dataclass(frozen=True)
class Ratio:
    """Perplexity of the smaller model over the whole one's, with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratios(model: str) -> dict[str, Ratio]:
    """A quarter of the experts fewer, on domains not calibrated on: the default and what was published, by name."""
    wanted = {"default": (DEFAULT, "model", RIDGE), "REAP with refit": ("reap", "layer", RIDGE)}
    wanted |= {name: (name, "layer", 0) for name in _PUBLISHED}
    kept = [row for row in map(json.loads, _kept(model)) if row["split"] == "test" and not row.get("distil")]
    kept = [row for row in kept if not _is_former(row)]
    found = {}
    for name, cell in wanted.items():
        samples = [
            row for row in kept if (row["criterion"], row["scope"], row["ridge"]) == cell and not _is_former(row)
        ]
        if samples:
            found[name] = _ratio_over(samples, BUDGETS.index(0.75), OUTSIDE)
    return found


def _ratio_over(samples: Sequence[Any], at: int, names: Sequence[str]) -> Ratio:
    """At one budget; samples of text and documents are drawn with replacement, domains are as they are."""
    generator = np.random.default_rng(0)
    each = [_ratio(one["rows"][at]["nats"], one["tokens"], names) for one in samples]
    mean = math.exp(sum(map(math.log, each)) / len(each))
    drawn = np.zeros(_DRAWS)
    for name in names:
        nats = np.array([one["rows"][at]["nats"][name] for one in samples])  # (samples, documents)
        tokens = np.array(samples[0]["tokens"][name])
        documents = generator.integers(len(tokens), size=(_DRAWS, len(tokens)))
        seeds = np.random.default_rng(1).integers(len(nats), size=(_DRAWS, len(nats)))  # the same for all domains
        drawn += (nats[seeds].mean(1)[np.arange(_DRAWS)[:, None], documents]).sum(1) / tokens[documents].sum(1)
    low, high = np.exp(np.quantile(drawn / len(names), ENDS))
    return Ratio(mean, float(low), float(high))


def main(words: list[str] | None = None) -> None:
    """Runs a study, keeps its rows and prints the table."""
    parser = argparse.ArgumentParser("python -m studies.criteria", description=__doc__)
    parser.add_argument("model", choices=list(SUBJECTS))
    parser.add_argument("--at", help="folder that the model was built in, if it is no part of the package")
    parser.add_argument("--work", type=Path, default=Path("runs/criteria"), help="where captures and cells lie")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of the kept rows")
    given = parser.parse_args(words)
    if not given.table:
        torch.set_num_threads(1)
        run(given.model, given.at or given.model, given.work / given.model)
        keep(given.model, given.work / given.model)
    print(table(given.model))


if __name__ == "__main__":
    main()
