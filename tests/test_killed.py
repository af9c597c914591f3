"""Fifty kills at random moments of each kind of work that goes on where it was killed (opt-in: minutes).

``pytest -m heavy -s tests/test_killed.py`` prints how often each was killed and how often it came to its end.
"""

from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tests.killing import kill_at_random
from tests.lab.tiny_runs import question_task, tiny_bert, tiny_settings
from tests.lab.tiny_studies import write_study
from tests.tiny_moe import VOCAB, build
from transformers import AutoModelForCausalLM

from lamella import LamellaError
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.run import train
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.runner import work
from lamella.lab.studies.study import summarise
from lamella.similarity.activations import Capture, capture, checkpoints
from lamella.similarity.alignment import sweep

pytestmark = pytest.mark.heavy

KILLS = 50
TIMES = {"build_seconds", "train_seconds", "seconds_per_step", "peak_memory_bytes"}


def trained(settings, folder):
    with suppress(LamellaError) if RunFolder(folder).finished else nullcontext():  # what a user is told then
        train(settings, folder)


def left_by_train(folder):
    assert not (folder / "checkpoints").exists()
    tables = {name: pd.read_parquet(folder / name) for name in ("predictions.parquet", "routing.parquet")}
    metrics = pd.read_json(folder / "metrics.json", typ="series").to_dict()
    measured = {name: value for name, value in metrics.items() if name not in TIMES}
    return {**tables, "metrics": measured, "weights": load_file(folder / "adapter/adapter_model.safetensors")}


def left_by_compare(grid, folder):
    assert not list(folder.path.glob("runs/*/checkpoints"))
    summarise(grid, grid.cells(), folder)
    return pd.read_parquet(folder.path / "results.parquet").drop(columns=["study", *TIMES])


def documents():
    draw = torch.Generator().manual_seed(0)
    for start in range(0, 400, 8):
        yield {
            "input_ids": torch.randint(3, VOCAB, (8, 16), generator=draw),
            "rows": torch.arange(start, start + 8),
        }


def captured(folder):
    torch.set_num_threads(1)
    checkpoints.SECONDS, checkpoints._SHARE = 0.0, 0  # a checkpoint after every batch
    capture(build("qwen2_moe"), documents(), folder, per_expert=32)


def left_by_capture(folder):
    taken = Capture.load(folder)
    assert taken.manifest.complete
    samples = {f"{at} {part}": getattr(taken, part)(*at) for at in taken.experts for part in ("keys", "inputs", "rows")}
    return {**samples, "routing": taken.routing, "coactivation": taken.coactivation}


def load(name, dtype):
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()


def aligned(study, folder):
    torch.set_num_threads(1)
    sweep(
        Capture.load(study / "capture"), study / "model", folder, load=load, aligner="linear", steps=40, tile_pairs=11
    )


def left_by_align(study, folder):
    names = sorted(path.name for path in (folder / "tiles").iterdir())
    table = sweep(
        Capture.load(study / "capture"), study / "model", folder, load=load, aligner="linear", steps=40, tile_pairs=11
    )
    return {"tiles": names, "table": table}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Of each kind of work: what does it, where, and what it leaves."""
    folder: Path = tmp_path_factory.mktemp("killed")
    bert, task = tiny_bert(folder / "bert"), question_task(folder / "task")
    method = {"name": "mola", "r": 2, "num_experts": "2-4", "top_k": 2, "lora_dropout": 0.2}
    settings = tiny_settings(bert, task, method, max_steps=24, evaluate_every=3, threads=1)
    grid = read_study(write_study(folder / "study.yaml", bert, task, max_steps=12, evaluate_every=3), ["seeds=1"])
    model = build("qwen2_moe", moe_intermediate_size=8)
    model.save_pretrained(folder / "model")
    capture(model, documents(), folder / "capture", per_expert=64)
    return {
        "train": (partial(trained, settings), Path, left_by_train),
        "compare": (partial(work, grid.cells()), StudyFolder, partial(left_by_compare, grid)),
        "capture": (captured, Path, left_by_capture),
        "align": (partial(aligned, folder), Path, partial(left_by_align, folder)),
    }


@pytest.mark.parametrize("kind", ["train", "compare", "capture", "align"])
def test_fifty_kills_change_nothing(kinds, fresh, tmp_path, kind):
    work_of, place, left = kinds[kind]

    kills, ends = kill_at_random(fresh, work_of, place, tmp_path, left, KILLS, seed=0)

    print(f"\n{kind}: {kills} kills, {ends} times at its end with the same result")
    assert kills == KILLS
