"""Redundancy against the dense computation, and the same in any basis."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tests import tiny

from lamella import LamellaError, MolaConfig
from lamella.tuners.redundancy import COLUMNS, redundancy


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, tiny.MolaLinear)]


@torch.no_grad()
def dense(layer, adapter="default"):
    """All products written out."""
    A, B = layer.lamella_mola_lora_A[adapter].weight.double(), layer.lamella_mola_lora_B[adapter].weight.double()
    deltas = [layer.experts[adapter].scaling * b @ a for a, b in zip(A, B, strict=True)]
    distances = [torch.linalg.matrix_norm(one - other) for one, other in itertools.combinations(deltas, 2)]
    raw = torch.stack(distances).mean()
    return float(raw), float(raw / torch.stack([torch.linalg.matrix_norm(delta) for delta in deltas]).mean())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_it_is_the_dense_computation(name):
    model = tiny.adapted(tiny.MODELS[name](), num_experts=[3, 5], use_rslora=True)

    frame = redundancy(model)

    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == len(layers_of(model))
    for row, layer in zip(frame.itertuples(), layers_of(model), strict=True):
        assert f"{row.stack}.{row.layer}.{row.module}" == layer.name
        assert (row.raw, row.normalised) == pytest.approx(dense(layer), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_the_basis_of_the_factors_does_not_matter(seed):
    model = tiny.adapted(tiny.bert(layers=1)).double()
    before = redundancy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model):
            A, B = layer.lamella_mola_lora_A["default"].weight, layer.lamella_mola_lora_B["default"].weight
            change = torch.randn(len(A), 2, 2, generator=generator, dtype=torch.float64) + 3 * torch.eye(2)
            A.copy_(change @ A)
            B.copy_(B @ torch.linalg.inv(change))

    after = redundancy(model)

    for column in ("raw", "normalised"):
        assert after[column].tolist() == pytest.approx(before[column].tolist(), rel=1e-6)


def test_larger_updates_of_the_same_kind_are_only_larger():
    model = tiny.adapted(tiny.bert(layers=1))
    before = redundancy(model)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.lamella_mola_lora_B["default"].weight.mul_(3)

    after = redundancy(model)

    assert after["raw"].tolist() == pytest.approx((3 * before["raw"]).tolist())
    assert after["normalised"].tolist() == pytest.approx(before["normalised"].tolist())


def test_twins_are_at_no_distance():
    model = tiny.adapted(tiny.bert(layers=1))
    with torch.no_grad():
        for layer in layers_of(model):
            for factor in (layer.lamella_mola_lora_A["default"].weight, layer.lamella_mola_lora_B["default"].weight):
                factor[1:] = factor[0]

    assert redundancy(model)["normalised"].tolist() == pytest.approx([0.0] * 6, abs=1e-6)


def test_untrained_experts_have_no_normalised_distance():
    frame = redundancy(tiny.adapted(tiny.bert(), init_lora_weights=True))

    assert (frame["raw"] == 0).all()
    assert frame["normalised"].isna().all()


def test_single_experts_have_no_row_and_adapters_are_told_apart():
    model = get_peft_model(
        tiny.bert(), MolaConfig(r=2, num_experts=[1, 3], target_modules=["query"], init_lora_weights=False)
    )
    model.add_adapter("other", MolaConfig(r=2, num_experts=2, target_modules=["value"], init_lora_weights=False))

    assert set(redundancy(model)["layer"]) == {1}
    assert set(redundancy(model, "other")["layer"]) == {0, 1}
    with pytest.raises(LamellaError, match="no adapter 'third' with LoRA experts"):
        redundancy(model, "third")
    with pytest.raises(LamellaError, match="no active adapter with LoRA experts"):
        redundancy(tiny.bert())
