"""A run that the first edition wrote is examined, evaluated, traced and exported as it was then."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

import lamella
from lamella.lab.runs.evaluating import evaluate, trace
from lamella.lab.runs.exporting import export_as_experts, export_collapsed

WRITTEN = Path(__file__).parents[2] / "first_edition"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())["run"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The run's folder in a copy of all that it rests on; paths in it are relative."""
    for name in ("base", "rows", "run"):
        shutil.copytree(WRITTEN / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return Path("run")


def test_it_is_evaluated_and_examined(run):
    found = evaluate(run).as_dict()

    metrics = found.pop("metrics")
    assert metrics == pytest.approx(EXPECTED["evaluate"]["metrics"])
    assert "cannot be checked" in found.pop("notes")[0]  # it kept no digests of its rows
    assert (found.pop("trained_on"), found.pop("unseen")) == (None, None)
    assert found == {key: value for key, value in EXPECTED["evaluate"].items() if key not in ("metrics", "notes")}
    diagnosis = lamella.doctor(run)
    assert diagnosis.ok, diagnosis
    assert len(diagnosis.checked) >= len(EXPECTED["doctor"]["checked"])
    assert sum("cannot be checked" in line for line in diagnosis.checked) == 2  # nor of its files
    assert any("4 validation rows predicted again" in line for line in diagnosis.checked)


def test_it_is_traced(run, tmp_path):
    traced = trace(run, split="validation")

    before = pd.read_parquet(run / "trace.parquet")
    after = traced.frame[traced.frame.columns.intersection(before.columns)]
    assert after["module"].tolist() == before["module"].tolist()
    traced.save(tmp_path / "trace")
    again = pd.read_parquet(tmp_path / "trace" / "trace.parquet")
    assert again["share"].tolist() == pytest.approx(traced.frame["share"].tolist())


def test_it_is_exported(run, tmp_path):
    experts = export_as_experts(run, tmp_path / "experts")
    collapsed = export_collapsed(run, tmp_path / "lora", rows=8)

    assert all((folder / "adapter_model.safetensors").is_file() for folder in (*experts.adapters, *collapsed.adapters))
