"""A routing method that lamella has never seen: it is trained, traced, examined, compared and reported as any other.

Its experts are biases: ``y = W x + g_e b_e`` with the one expert e that a token's router prefers.
"""

import json
import sys
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tests import tiny
from tests.lab.tiny_studies import RUN
from torch import nn

import lamella
from lamella import cli
from lamella.backbones import find_place, locate_stacks
from lamella.lab.methods.base import Built, Method, method, shared
from lamella.routing import current_frame, make_router
from lamella.tuners.config import LamellaConfig
from lamella.tuners.model import RoutedModel
from lamella.tuners.registry import register
from lamella.tuners.routed import RoutedLayer


class ToyType(str, Enum):
    TOY = "TOY"


@dataclass
class ToyConfig(LamellaConfig):
    num_experts: int = 3

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = ToyType.TOY


class ToyLinear(nn.Module, BaseTunerLayer):
    adapter_layer_names = ("toy_router", "toy_bias")

    def __init__(self, base_layer, place):
        super().__init__()
        self.base_layer, self.place = base_layer, place
        self.toy_router, self.toy_bias = nn.ModuleDict(), nn.ParameterDict()

    def update_layer(self, adapter, config):
        self.toy_router[adapter] = make_router("linear", self.base_layer.in_features, config.num_experts)
        self.toy_bias[adapter] = nn.Parameter(0.1 * torch.randn(config.num_experts, self.base_layer.out_features))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x):
        y, frame = self.base_layer(x), current_frame()
        for adapter in [] if self.disable_adapters else self.active_adapters:
            routing = self.toy_router[adapter](x.flatten(0, -2), 2)
            for observe in frame.observers if frame else ():
                observe(self, adapter, routing, frame.token_mask(x), x.shape[:-1])
            y = y + (routing.dense_weights() @ self.toy_bias[adapter]).view(y.shape)
        return y

    def routed_layer(self, adapter):
        router, place = self.toy_router[adapter], self.place
        name = f"{place.stack}.{place.layer}.{place.module}"
        return RoutedLayer(self, name, place, adapter, router, len(self.toy_bias[adapter]), top_k=2)


class ToyModel(RoutedModel):
    prefix, tuner_layer_cls, method = "toy_", ToyLinear, "Toy"
    cannot_merge = "A toy chooses biases per token."

    def _create_and_replace(self, config, adapter, target, target_name, parent, current_key, *args, **kwargs):
        place = find_place(current_key, locate_stacks(self.model))
        if place is not None:
            layer = ToyLinear(target, place)
            layer.update_layer(adapter, config)
            self._replace_module(parent, target_name, layer, target)


@pytest.fixture(autouse=True, scope="module")
def registered():
    register(ToyType.TOY, ToyConfig, ToyModel)

    @method("toy")
    class Toy(Method):
        name: Literal["toy"] = "toy"
        num_experts: int = 3

        def build(self, backbone, task):
            config = ToyConfig(num_experts=self.num_experts, target_modules=["dense"], **shared(backbone, task))
            return Built(get_peft_model(backbone.model, config))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process; gives its standard output."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lamella", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        assert not exit_.value.code, err
        return out

    return run


def errors(diagnosis):
    """A toy without balance loss may well send every token to one expert, which is a warning."""
    return [finding for finding in diagnosis.findings if finding.severity == "error"]


def test_the_library_knows_it_by_its_layers(tmp_path):
    torch.manual_seed(0)
    base = tiny.bert()
    model = get_peft_model(base, ToyConfig(target_modules=["dense"], modules_to_save=["classifier"]))
    batch = tiny.batch(base, rows=6, tokens=29)

    with lamella.record_routing(model) as trace:
        expected = model.eval()(**batch).logits
    routers = 3 * 2  # attention output, intermediate and output of two blocks
    assert len(trace.routers) == routers
    assert {use.num_experts for use in trace.routers} == {3}
    diagnosis = lamella.doctor(model, batches=[batch])
    assert not errors(diagnosis), diagnosis
    assert any(f"arrives at {routers} of {routers} routers" in line for line in diagnosis.checked)
    assert any(f"{routers} of {routers} routers judged" in line for line in diagnosis.checked)
    groups = {group["name"]: len(group["params"]) for group in lamella.param_groups(model, 1e-3, router_lr=1e-4)}
    assert groups["router"] == routers
    with pytest.raises(lamella.LamellaError, match="not LoRAs that lie side by side"):
        lamella.collapse(model, [batch])
    with pytest.raises(lamella.CannotMergeError, match="A toy chooses biases"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny.bert(), tmp_path).eval()(**batch).logits, expected)


def test_the_commands_run_it(command, bert, questions, tmp_path):
    run, words = tmp_path / "run", [f"{key}={value}" for key, value in RUN.items()]
    command("train", "--model", bert, "--task", questions, "--method", "toy", *words, "-o", run)
    assert json.loads((run / "metrics.json").read_text())["routing"]["entropy"] > 0
    assert len(pd.read_parquet(run / "trace.parquet").groupby(["layer", "module"])) == 3 * 2
    command("trace", run, "-o", tmp_path / "trace")
    assert "Routing of" in (tmp_path / "trace" / "report.html").read_text()
    diagnosis = lamella.doctor(run)
    assert not errors(diagnosis), diagnosis
    assert any("routing on the run's validation rows: 6 of 6 routers" in line for line in diagnosis.checked)


def test_a_study_compares_it(command, bert, questions, tmp_path):
    study = {
        "backbones": [bert], "tasks": [questions], "seeds": [0], "reference": "LoRA",
        "run": RUN | {"max_steps": 2}, "methods": {"toy": {"method": "toy"}, "LoRA": {"method": "lora"}},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))

    command("compare", tmp_path / "study.yaml", "-o", tmp_path / "out")

    page = (tmp_path / "out" / "report.html").read_text()
    assert "toy" in page
    assert "Routing" in page
