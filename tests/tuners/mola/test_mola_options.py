"""What MoLA's experts can share or start from holds on every way into and out of an adapter."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny
from torch import Tensor, nn

import lamella
from lamella import LamellaError
from lamella.lab.studies.costs import active_parameters

OPTIONS: dict[str, dict[str, Any]] = {"shared A": {"share_lora_a": True}}


def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def off_start(model: PeftModel) -> PeftModel:
    """The adapter with other factors than it began with."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(option: str, base: nn.Module | None = None, **config: Any) -> PeftModel:
    return off_start(tiny.adapted(base or tiny.llama(layers=1), **{**config, **OPTIONS[option]}))


@pytest.mark.parametrize("option", OPTIONS)
def test_saved_and_loaded_it_is_bit_equal(option: str, tmp_path: Path) -> None:
    model = adapted(option, tiny.gpt2(), num_experts=[1, 3], top_k=[1, 2])
    given = tiny.inputs(model.get_base_model())
    model.save_pretrained(tmp_path)
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(tiny.gpt2(), tmp_path, **options).eval()
        assert torch.equal(run(again, given), run(model, given))
    with again.disable_adapter():
        assert torch.equal(run(again, given), run(tiny.gpt2(), given))


@pytest.mark.parametrize("option", OPTIONS)
def test_the_exported_experts_weighted_by_the_routers_are_the_mixture(option: str, tmp_path: Path) -> None:
    model = adapted(option, tiny.bert(), num_experts=[2, 3], target_modules=["query"])
    folders = lamella.export_experts(model, tmp_path)
    loras = [PeftModel.from_pretrained(tiny.bert(), folder) for folder in folders]
    for block in (0, 1):
        layer = model.get_base_model().bert.encoder.layer[block].attention.self.query
        x = torch.randn(4, layer.in_features)
        weights = layer.lamella_mola_router["default"](x, 2).dense_weights()
        base = layer.base_layer(x)
        total = base.clone()
        for expert in range(block + 2):
            query = loras[expert].get_base_model().bert.encoder.layer[block].attention.self.query
            total += weights[:, expert, None] * (query(x) - base)
        torch.testing.assert_close(layer(x), total)


@pytest.mark.parametrize("option", OPTIONS)
def test_constant_weights_collapse_exactly(option: str) -> None:
    model = adapted(option, num_experts=3, top_k=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.zero_()
    given = [tiny.inputs(model.get_base_model(), rows=4, tokens=9, seed=seed) for seed in range(2)]
    assert lamella.collapse(model, given).error < 1e-4


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_redundancy_is_that_of_what_each_expert_adds(option: str) -> None:
    model = adapted(option, num_experts=3, target_modules=["q_proj"]).double()
    (layer,) = [module for module in model.modules() if isinstance(module, tiny.MolaLinear)]
    each = [lamella.moe_layers(model)[0].experts[expert] for expert in range(3)]
    unit = torch.eye(layer.in_features, dtype=torch.float64)
    deltas = [expert(unit) for expert in each]
    distances = [torch.linalg.matrix_norm(one - other) for one, other in itertools.combinations(deltas, 2)]
    norms = [torch.linalg.matrix_norm(delta) for delta in deltas]
    raw = torch.stack(distances).mean()
    (row,) = lamella.redundancy(model).itertuples()
    assert (row.raw, row.normalised) == pytest.approx((float(raw), float(raw / torch.stack(norms).mean())), rel=1e-9)


def test_experts_that_share_cannot_be_swapped() -> None:
    model = adapted("shared A", tiny.llama(), target_modules=["q_proj"])
    with pytest.raises(LamellaError, match="q_proj share one A"), lamella.similarity.swap(model, (0, 0), (1, 1)):
        pass


def test_a_shared_a_counts_once_and_is_never_idle() -> None:
    model = tiny.adapted(tiny.bert(layers=1), r=2, num_experts=4, top_k=1, target_modules=["query"], share_lora_a=True)
    A, B, router = 2 * tiny.HIDDEN, 4 * 2 * tiny.HIDDEN, 4 * tiny.HIDDEN
    assert model.get_nb_trainable_parameters()[0] == model.base_model.summary().trainable == A + B + router
    assert active_parameters(model) == A + B // 4 + router
