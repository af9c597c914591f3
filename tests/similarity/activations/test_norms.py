import sys

import pandas as pd
import pytest
import torch
from tests import tiny_moe

from lamella.backbones.moe import moe_layers
from lamella.similarity.activations import capture
from lamella.similarity.activations.norms import distributions


@pytest.fixture
def measured(tmp_path):
    model = tiny_moe.build("qwen2_moe")
    captured = capture(model, [tiny_moe.inputs(4, 12, seed=seed) for seed in range(4)], tmp_path / "capture", 16)
    return model, captured, *distributions(captured, model)


def test_shares_of_a_layer_and_side_sum_to_one_and_the_middle_norm_is_right(measured):
    model, captured, norms, _ = measured
    assert norms.groupby(["layer", "side"])["share"].sum().tolist() == pytest.approx([1.0] * 6)
    for layer in moe_layers(model):
        x = torch.cat([captured.inputs(at, e) for at, e in captured.experts if at == layer.index])
        rows = norms[(norms["layer"] == layer.index) & (norms["side"] == "input")]
        width = rows["norm"].diff().iloc[1]
        assert (rows["norm"] * rows["share"]).sum() == pytest.approx(float(x.norm(dim=1).mean()), abs=width)


def test_the_plane_holds_tokens_of_every_expert_and_most_of_what_two_directions_can_hold(measured):
    _, captured, _, plane = measured
    inputs = plane[plane["side"] == "input"]
    assert set(zip(inputs["layer"], inputs["expert"], strict=True)) == set(captured.experts)
    tokens = torch.cat([captured.inputs(*name)[:8] for name in captured.experts])
    centred = tokens - tokens.mean(0)
    two = torch.linalg.svdvals(centred)[:2].square().sum()
    assert inputs[["x", "y"]].pow(2).to_numpy().sum() == pytest.approx(float(two), rel=1e-4)
    assert isinstance(plane, pd.DataFrame)


def test_of_more_numbers_than_torch_can_order_every_so_many_are_taken(measured, monkeypatch):
    model, captured, norms, _ = measured
    tokens = sum(len(captured.inputs(*name)) for name in captured.experts)
    taken, whole = [], torch.Tensor.quantile
    monkeypatch.setattr(torch.Tensor, "quantile", lambda x, q: taken.append(len(x)) or whole(x, q))
    monkeypatch.setattr(sys.modules[distributions.__module__], "_QUANTILE", tokens // 3)
    again, _ = distributions(captured, model)
    assert tokens // 8 < taken[0] <= tokens // 3
    assert again.groupby(["layer", "side"])["share"].sum().tolist() == pytest.approx([1.0] * 6)
    reach = norms.groupby("side")["norm"].max(), again.groupby("side")["norm"].max()
    assert reach[1].tolist() == pytest.approx(reach[0].tolist(), rel=0.2)
