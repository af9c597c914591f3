import pandas as pd
import pytest
import torch
from tests.tiny_moe import EXPERTS, FAMILIES, PATHS, inputs, inputs_for

from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.similarity.swapping import routing_shift, swap


@pytest.mark.parametrize("family", PATHS)
def test_shares_of_every_layer_sum_to_one_and_padding_is_out(family):
    model = FAMILIES[family]()
    batch = inputs_for(model, padding="right")
    layers = [layer.index for layer in moe_layers(model)]
    shift = routing_shift(model, [batch], *layers[:2], unit="router+experts")
    sums = shift.groupby("layer")[["share_before", "share_after"]].sum()
    assert sums.index.tolist() == layers
    assert sums.to_numpy() == pytest.approx(1)
    if family != "switch_transformers":
        assert (shift[["dropped_before", "dropped_after"]] == 0).all(axis=None)


def test_padding_is_out():
    model = FAMILIES["olmoe"]()
    batch = inputs(padding="right")
    apart = [
        {name: tensor[row : row + 1, : 7 - row] for name, tensor in batch.items()}  # row r is r tokens shorter
        for row in range(3)
    ]
    pd.testing.assert_frame_equal(
        routing_shift(model, apart, 0, 1, "block"), routing_shift(model, [batch], 0, 1, "block")
    )


def test_shares_are_those_of_the_routers_choices():
    model = FAMILIES["mixtral"]()
    batch = inputs(padding=None)
    shift = routing_shift(model, [batch], 0, 2, unit="router")
    first = model.model.layers[0]
    seen = []
    handle = first.mlp.gate.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    with torch.no_grad():
        model(**batch)
        with swap(model, 0, 2, "router"):
            model(**batch)
    handle.remove()
    for column, indices in zip(("share_before", "share_after"), seen, strict=True):
        share = torch.bincount(indices.flatten(), minlength=EXPERTS) / indices.numel()
        assert shift[shift["layer"] == 0][column].tolist() == pytest.approx(share.tolist())
    assert (shift[shift["layer"] == 0]["share_before"] != shift[shift["layer"] == 0]["share_after"]).any()


def test_choices_without_room_are_counted_apart():
    model = FAMILIES["switch_transformers"]()
    layer = moe_layers(model)[0]
    with torch.no_grad():
        layer.router_module.classifier.weight.zero_()  # all choose expert 0, which has room for two
    shift = routing_shift(model, [inputs_for(model, padding=None)], layer.index, layer.index, unit="router")
    rows = shift[shift["layer"] == layer.index]
    assert rows["share_before"].tolist() == [1, 0, 0, 0]
    assert rows["dropped_before"].tolist() == rows["dropped_after"].tolist() == [3 * 5, 0, 0, 0]


def test_the_model_is_as_before():
    model = FAMILIES["qwen2_moe"]().train()
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    routing_shift(model, [inputs()], (0, 0), (1, 0))
    assert model.training
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_what_cannot_be_swapped_is_refused():
    with pytest.raises(LamellaError, match="experts 0 to 3"):
        routing_shift(FAMILIES["mixtral"](), [inputs()], (0, 9), (1, 0))
