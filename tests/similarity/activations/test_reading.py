"""What other steps read of a capture."""

import json

import pytest
import torch
from tests.similarity.activations.streams import batches, documents
from tests.tiny_moe import EXPERTS, FAMILIES, HIDDEN

from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.similarity.activations import Capture, capture


@pytest.fixture(scope="module")
def model():
    return FAMILIES["mixtral"]()


@pytest.fixture(scope="module")
def snapshot(model, tmp_path_factory) -> Capture:
    return capture(model, batches(documents(count=30)), tmp_path_factory.mktemp("capture"), per_expert=40)


def test_inputs_are_float32_in_the_order_of_their_keys(snapshot):
    assert snapshot.experts == [(layer, expert) for layer in range(3) for expert in range(EXPERTS)]
    assert snapshot.hidden_size == HIDDEN
    for at in snapshot.experts:
        inputs, keys = snapshot.inputs(*at), snapshot.keys(*at)
        assert inputs.dtype == torch.float32
        assert inputs.shape == (len(keys), HIDDEN)
        assert (keys.diff() > 0).all()
        assert len(snapshot.rows(*at)) == len(snapshot.positions(*at)) == len(keys) <= 40


def test_no_document_is_on_both_sides_nor_on_another_side_elsewhere(snapshot):
    sides: dict[int, set[bool]] = {}
    for at in snapshot.experts:
        train, held_out = snapshot.split(*at)
        rows = snapshot.rows(*at)
        assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(len(rows)))
        for indices, side in ((train, False), (held_out, True)):
            assert (indices.diff() > 0).all()
            for row in rows[indices].tolist():
                sides.setdefault(row, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert {True, False} == set.union(*sides.values())


def test_the_share_held_out_is_the_share_asked_for(snapshot):
    class Many(Capture):
        def rows(self, layer: int, expert: int) -> torch.Tensor:
            return torch.arange(20_000)

    many = Many(snapshot.folder, snapshot.manifest, {})
    small = many.split(0, 0, held_out=0.2)[1]
    assert abs(len(small) / 20_000 - 0.2) < 0.01
    assert set(small.tolist()) <= set(many.split(0, 0, held_out=0.5)[1].tolist())
    other = many.split(0, 0, held_out=0.2, seed=1)[1]
    assert abs(len(set(small.tolist()) & set(other.tolist())) / 20_000 - 0.04) < 0.01
    for share in (0.0, 1.0, 2):
        with pytest.raises(LamellaError, match="held_out"):
            many.split(0, 0, held_out=share)


def test_experts_with_too_few_samples_are_named(model, tmp_path):
    snapshot = capture(model, batches(documents(count=2)), tmp_path, per_expert=40)
    captured = snapshot.routing.set_index(["layer", "expert"]).captured
    few = int(captured.median())
    assert snapshot.short(few) == [at for at in snapshot.experts if captured[at] < few]
    assert snapshot.short(0) == []
    assert snapshot.short(10_000) == snapshot.experts


def test_an_expert_that_never_fires_is_there_without_samples(tmp_path):
    model = FAMILIES["mixtral"]()
    with moe_layers(model)[1].mask([2]):
        snapshot = capture(model, batches(documents()), tmp_path, per_expert=4)
    assert snapshot.short(1) == [(1, 2)]
    assert snapshot.routing.query("selected == 0")[["layer", "expert"]].values.tolist() == [[1, 2]]
    assert snapshot.inputs(1, 2).shape == (0, HIDDEN)
    assert [len(side) for side in snapshot.split(1, 2)] == [0, 0]
    assert snapshot.coactivation.share.isna().sum() == 0


def test_shares_add_up(snapshot):
    by_layer = snapshot.routing.groupby("layer")
    assert by_layer.share.sum().tolist() == pytest.approx([1.0] * 3)
    assert (by_layer.selected.sum() == 2 * by_layer.tokens.first()).all()
    together = snapshot.coactivation
    itself = together.query("expert == other").set_index(["layer", "expert"]).share
    selected = snapshot.routing.set_index(["layer", "expert"])
    assert itself.tolist() == pytest.approx((selected.selected / selected.tokens).tolist())
    # every token has one other choice beside each of its two
    others = together.query("expert != other").groupby("layer").share.sum()
    assert others.tolist() == pytest.approx([2.0] * 3)


def test_another_model_is_refused(model, snapshot):
    snapshot.check(model)
    other = FAMILIES["mixtral"](seed=1)
    with pytest.raises(LamellaError, match=r"is of the model MixtralForCausalLM (\w+), but this model is Mixtral"):
        snapshot.check(other)


def test_experts_that_are_not_there_are_told(snapshot):
    for at in ((7, 0), (0, EXPERTS), (0, -1)):
        with pytest.raises(LamellaError, match=r"no expert \(.*\); its layers: 0 \(4 experts\)"):
            snapshot.inputs(*at)


def test_folders_without_a_capture_are_told(snapshot, tmp_path):
    with pytest.raises(LamellaError, match="holds no capture"):
        Capture.load(tmp_path)
    for broken in ("no json", "{}", "[]", json.dumps({"format": 1, "layers": []})):
        (tmp_path / "manifest.json").write_text(broken)
        with pytest.raises(LamellaError, match="not a manifest of a capture"):
            Capture.load(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(LamellaError, match="of another format"):
        Capture.load(tmp_path)
