"""A small report and a trace generator shared by the reporting tests."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest

from lamella.lab.report import Report, TokenLayer, TokenText
from lamella.lab.report.heatmap import COLUMNS


def make_trace(num_experts, modules, stack="encoder", share=None, entropy=None):
    """A routing frame: even shares at full entropy unless told otherwise; `share` maps (layer, module) to shares."""
    rows = []
    for layer, experts in enumerate(num_experts):
        for module in modules:
            shares = (share or {}).get((layer, module), [1 / experts] * experts)
            nats = math.log(experts) if entropy is None else entropy
            rows += [(stack, layer, module, e, experts, shares[e], shares[e], nats, 4096) for e in range(experts)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


@pytest.fixture
def trace():
    """The trace generator."""
    return make_trace


@pytest.fixture
def results():
    return pd.DataFrame(
        {
            "method": ["TF-IDF floor", "LoRA", "MoLA 2-4-6-8", "full fine-tuning"],
            "task": "trec",
            "metric": "accuracy",
            "mean": [0.746, 0.874, 0.892, None],
            "seed 0": [0.746, 0.870, 0.886, None],
            "seed 1": [None, 0.878, 0.898, None],
            "interval": [None, (0.851, 0.897), (0.868, 0.915), None],
        }
    )


@pytest.fixture
def report(results):
    return Report(
        title="MoLA on TREC",
        summary="MoLA reaches 0.892, LoRA 0.874, the floor 0.746.",
        results=results,
        cost=pd.DataFrame({"method": ["LoRA", "MoLA 2-4-6-8"], "trainable parameters": [2304112, None]}),
        routing=make_trace([2, 4], ["q", "k"]),
        settings={"task": "trec", "method": {"r": 8, "lora": {"alpha": 16}}},
        notes=["Full fine-tuning was not run."],
    )


@pytest.fixture
def entropy():
    """Two runs whose entropy falls."""
    rows = [(f"MoLA, seed {seed}", step, 1 - step / 200 - seed / 100) for seed in (0, 1) for step in range(0, 50, 10)]
    return pd.DataFrame(rows, columns=["run", "step", "entropy"])


@pytest.fixture
def redundancy():
    """Three layers of two modules; the normalised distance grows with the layer."""
    rows = [
        ("encoder", layer, module, 0.1 * (layer + 1), 0.5 + 0.3 * layer)
        for layer in range(3)
        for module in ("query", "key")
    ]
    return pd.DataFrame(rows, columns=["stack", "layer", "module", "raw", "normalised"])


@pytest.fixture
def texts():
    """Two texts of two layers."""
    layers = ([[0.75, 0.25], [0.0, 1.0]], [[0.1, 0.2, 0.7], [1.0, 0.0, 0.0]])
    named = [TokenLayer(f"layer {at}", len(weights[0]), weights) for at, weights in enumerate(layers)]
    return [TokenText("a place", ["where", " is"], named), TokenText("a person", ["who", " was"], named)]


@pytest.fixture
def finding():
    """The generator of findings; a finding is any object with these attributes."""

    def make(severity, what="Expert 1 never fires"):
        return SimpleNamespace(severity=severity, what=what, where="layer 3", why="It costs memory.", fix="Raise it.")

    return make


@pytest.fixture
def full_report(report, entropy, redundancy, texts, finding):
    """A report with every section."""
    return replace(
        report,
        entropy=entropy,
        texts=texts,
        redundancy=redundancy,
        findings=[finding("error", "The router gets no gradient"), finding("warning")],
        findings_checked=True,
    )
