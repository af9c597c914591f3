"""A study that the first edition made opens, is reported and goes on."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tests.cli.test_similarity import run

from lamella.cli.similarity.subject import open_study
from lamella.similarity import Compressed
from lamella.similarity.alignment.table import by_aligner

KEPT = Path(__file__).parents[1] / "first_edition"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy, since paths in it are relative to where it lies."""
    for name in ("base", "rows", "similarity", "compressed"):
        shutil.copytree(KEPT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_tables_are_what_they_were(folder):
    study = open_study(Path("similarity"))
    known = json.loads((KEPT / "expected.json").read_text())["similarity"]
    for name, rows in known["rows"].items():
        table = study.folder.table(name)
        assert len(table) == rows
        for column, total in known["sums"][name].items():
            if column == "samples_per_parameter":  # it counted samples, not the numbers in them
                continue
            assert table[column].sum() == pytest.approx(total, nan_ok=True)
    assert {(one["aligner"], one["scored_on"], one["steps"]) for one in study.folder.aligned()} == {
        ("linear", "", 40), ("published", "", 40),
    }  # fmt: skip


def test_it_goes_on(folder, monkeypatch):
    study = Path("similarity")
    before = pd.read_parquet(study / "alignment.parquet")
    align = ("align", study, "--aligner", "low-rank", "--seeds", 1, "--steps", 2, "--per-source", 1)
    assert run(monkeypatch, *align) == 0
    aligned = by_aligner(pd.read_parquet(study / "alignment.parquet"))
    assert list(aligned) == ["linear", "low-rank", "published"]
    changed = ["aligner", "samples_per_parameter"]  # what was called layernorm, and what was counted
    for name, rows in before.replace({"aligner": {"layernorm": "published"}}).groupby("aligner"):
        now, then = (one.drop(columns=changed).reset_index(drop=True) for one in (aligned[name][rows.columns], rows))
        pd.testing.assert_frame_equal(now, then)
    assert run(monkeypatch, "report", study) == 0
    assert "Not run" not in (study / "report.html").read_text(encoding="utf-8")


def test_its_compressed_model_answers_as_it_did(folder):
    small = Compressed.load(folder / "compressed").model
    with torch.no_grad():
        logits = small(**load_file("base/inputs.safetensors")).logits
    written = load_file("compressed/logits.safetensors")["compressed"]
    torch.testing.assert_close(logits, written, rtol=1e-3, atol=5e-4)  # another processor sums in another order
