"""`python -m studies.criteria`: which criterion leaves the best smaller model; kept rows, and the table made from them.

A model is calibrated on some of its domains and measured on all, with three samples of text. A cell is one sample, one
criterion and one scope, with the refit or without, at three budgets. It is on disk once; a call goes on with the rest.
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
from typing import Any

import numpy as np
import torch

from lamella.backbones.moe import moe_layers
from lamella.files import write_atomic
from lamella.lab.data import load_backbone, load_task
from lamella.similarity import capture, text_batches
from lamella.similarity.compression.budget import Scope
from lamella.similarity.compression.calibration import layer_gradients
from lamella.similarity.compression.compressed import Settings, compress_each, rank_experts
from lamella.similarity.compression.criteria import CRITERIA
from lamella.similarity.compression.perplexity import score
from lamella.similarity.swapping.scores import Batch
from studies.tables import markdown

ROWS = Path(__file__).parent / "criteria_rows"
BUDGETS = (0.875, 0.75, 0.5)
SEEDS = (0, 1, 2)
TOKENS = 12_000  # of each domain that is calibrated on
DOMAINS = {"tiny-moe": (("news", "technical"), ("dialogue", "glosses"))}  # calibrated on, and not
_PER_EXPERT = 1024
_TRAIN = 640  # documents of each domain, to draw from
_TEST = {"news": 24, "technical": 24, "dialogue": 96, "glosses": 96}  # to measure on; those of the last two are short
_BARE = ("reconstruction", "reap", "frequency", "hc-smoe")  # measured without the refit too
_SCOPES: tuple[Scope, ...] = ("model", "layer")
_DRAWS = 2000


@dataclass(frozen=True)
class Cell:
    """One sample of text, one criterion, one scope, one finish."""

    seed: int
    criterion: str
    scope: Scope
    refit: bool
    weighted: bool = True

    @property
    def file(self) -> str:
        """Its rows."""
        finish = ("refit" if self.refit else "bare") + ("" if self.weighted else "-unweighted")
        return f"{self.seed}-{self.scope}-{self.criterion}-{finish}.json"


def cells() -> Iterator[Cell]:
    """All of them, the first sample's first; published criteria that are told without a refit have one without, too."""
    for seed, scope, name in product(SEEDS, _SCOPES, CRITERIA):
        yield Cell(seed, name, scope, True)
        if name in _BARE:
            yield Cell(seed, name, scope, False)
    yield from (Cell(seed, "reconstruction", "model", True, weighted=False) for seed in SEEDS)


def run(model: str, work: Path) -> None:
    """Runs what is not done yet; a cell is a file in ``work``, beside the captures."""
    backbone = load_backbone(model)
    network, tokenizer = backbone.model.eval(), backbone.tokenizer
    inside, outside = DOMAINS[model]
    names = (*inside, *outside)
    test: dict[str, list[Batch]] = {}
    for name in names:
        test[name] = list(text_batches(load_task(name), tokenizer, "test", 256, 16, _TEST[name]))
    whole = score(network, test)
    work.mkdir(parents=True, exist_ok=True)
    for line in _kept(model):  # what was measured elsewhere is not measured again
        row = json.loads(line)
        (work / Cell(**{field.name: row[field.name] for field in fields(Cell)}).file).write_text(line, encoding="utf-8")
    for seed in SEEDS:
        left = [cell for cell in cells() if cell.seed == seed and not (work / cell.file).exists()]
        if not left:
            continue
        texts = [batch for name in inside for batch in _calibration(name, tokenizer, seed)]
        taken = capture(network, texts, work / f"capture-{seed}", per_expert=_PER_EXPERT, seed=seed)
        gradients = layer_gradients(network, moe_layers(network), texts)
        ranked = {name: rank_experts(network, taken, name, seed) for name in {cell.criterion for cell in left}}
        for cell in left:
            settings = Settings(cell.criterion, cell.scope, cell.weighted, cell.refit, seed=seed)
            rows, shown = [], []
            tokens = {name: whole[name].weights.tolist() for name in names}
            for small in compress_each(network, taken, BUDGETS, settings, texts, ranked[cell.criterion], gradients):
                after = score(small.model, test)
                nats = {name: (after[name].sums - whole[name].sums).round(3).tolist() for name in names}
                rows.append({"budget": small.report.budget, "parameters": small.report.parameters, "nats": nats})
                shown.append(f"{_ratio(nats, tokens, names):.3f}")
            write_atomic(work / cell.file, json.dumps({**asdict(cell), "tokens": tokens, "rows": rows}))
            print(cell.file, *shown, flush=True)


def _calibration(name: str, tokenizer: Any, seed: int) -> list[Batch]:
    """Documents of a domain's training split, drawn by the seed, until they hold ``TOKENS`` tokens."""
    batches = list(text_batches(load_task(name), tokenizer, "train", 256, 16, _TRAIN))
    drawn: list[Batch] = []
    held = 0
    for at in np.random.default_rng(seed).permutation(len(batches)):
        if held < TOKENS:
            drawn.append({key: tensor for key, tensor in batches[at].items() if key != "rows"})
            held += int(batches[at]["attention_mask"].sum())
    return drawn


def _ratio(nats: Mapping[str, Sequence[float]], tokens: Mapping[str, Sequence[float]], names: Sequence[str]) -> float:
    """The geometric mean over domains of the smaller model's perplexity over the whole one's."""
    return math.exp(sum(sum(nats[name]) / sum(tokens[name]) for name in names) / len(names))


def keep(model: str, work: Path) -> None:
    """Copies what was measured into the folder of kept rows, one line a cell."""
    ROWS.mkdir(exist_ok=True)
    done = [(work / cell.file).read_text(encoding="utf-8") for cell in cells() if (work / cell.file).exists()]
    with gzip.GzipFile(ROWS / f"{model}.jsonl.gz", "wb", mtime=0) as file:
        file.write("\n".join(done).encode())


def _kept(model: str) -> list[str]:
    """The kept rows, a line of JSON for each cell."""
    path = ROWS / f"{model}.jsonl.gz"
    return gzip.decompress(path.read_bytes()).decode().splitlines() if path.exists() else []


def section() -> str:
    """The section of the page of evidence, as Markdown; empty where nothing is kept."""
    tables = [f"**{model}**\n\n{table(model)}" for model in DOMAINS if _kept(model)]
    return "\n\n".join(["### Which criterion leaves the best smaller model?", _INTRODUCTION, *tables]) if tables else ""


_INTRODUCTION = """\
Perplexity of the smaller model over the whole one's, geometric mean of two domains that the experts were chosen on (in)
and of two they were not (out), held-out documents; 95 % intervals over samples of the calibration text and documents. A
model of whose budget each layer gives up its share beside one of which the cheapest experts of all layers go, costs
weighted by the layers' gradients. `python -m studies.criteria tiny-moe` measures what is missing."""


def table(model: str) -> str:
    """The kept rows of a model as a Markdown table, with intervals over samples of text and documents."""
    lines = _kept(model)
    inside, outside = DOMAINS[model]
    cells_of: dict[tuple[str, str, bool, bool], list[Any]] = {}
    for cell in map(json.loads, lines):
        key = cell["scope"], cell["criterion"], cell["refit"], cell["weighted"]
        cells_of.setdefault(key, []).append(cell)
    rows = []
    for (scope, name, refit, weighted), samples in cells_of.items():
        shown = [_with_interval(samples, at, names) for at in range(len(BUDGETS)) for names in (inside, outside)]
        finish = ("refit" if refit else "") + ("" if weighted else ", costs as they are")
        rows.append([scope, name, finish, len(samples), *shown])
    heads = [f"{1 - budget:.1%} fewer, {where}" for budget in BUDGETS for where in ("in", "out")]
    return markdown(["scope", "criterion", "then", "samples", *heads], rows)


def _with_interval(samples: Sequence[Any], at: int, names: Sequence[str]) -> str:
    """The ratio with its 95 % interval, samples of text and documents drawn with replacement, domains as they are."""
    generator = np.random.default_rng(0)
    ratios = [_ratio(one["rows"][at]["nats"], one["tokens"], names) for one in samples]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    drawn = np.zeros(_DRAWS)
    for name in names:
        nats = np.array([one["rows"][at]["nats"][name] for one in samples])  # (samples, documents)
        tokens = np.array(samples[0]["tokens"][name])
        documents = generator.integers(len(tokens), size=(_DRAWS, len(tokens)))
        seeds = np.random.default_rng(1).integers(len(nats), size=(_DRAWS, len(nats)))  # the same for all domains
        drawn += (nats[seeds].mean(1)[np.arange(_DRAWS)[:, None], documents]).sum(1) / tokens[documents].sum(1)
    low, high = np.exp(np.quantile(drawn / len(names), [0.025, 0.975]))
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def main(words: list[str] | None = None) -> None:
    """Runs a study, keeps its rows and prints the table."""
    parser = argparse.ArgumentParser("python -m studies.criteria", description=__doc__)
    parser.add_argument("model", choices=list(DOMAINS))
    parser.add_argument("--work", type=Path, default=Path("runs/criteria"), help="where captures and cells lie")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of the kept rows")
    given = parser.parse_args(words)
    if not given.table:
        torch.set_num_threads(1)
        run(given.model, given.work / given.model)
        keep(given.model, given.work / given.model)
    print(table(given.model))


if __name__ == "__main__":
    main()
