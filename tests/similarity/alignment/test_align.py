"""The table of an alignment: what it says of pairs, and the controls beside them."""

import logging
import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.similarity.alignment.fakes import fake_capture, tiny_model

from lamella.aligners import IDENTITY_SCALES
from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.similarity.alignment import (
    COLUMNS,
    KINDS,
    align,
    beyond_controls,
    fit_aligners,
    seed_ceiling,
    write_alignment,
)
from lamella.similarity.alignment import fitting as fitting_module

NAMES = list(COLUMNS[:4])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def capture(model):
    return fake_capture(model)


def _expert(model, layer, expert):
    return moe_layers(model)[layer].experts[expert]


def test_every_ordered_pair_and_control_has_a_row(model, capture):
    frame = align(capture, model, steps=5)
    assert list(frame.columns) == list(COLUMNS)
    assert frame["kind"].value_counts().to_dict() == {"pair": 30, "self": 6, "random-target": 6}
    assert not frame.duplicated(NAMES).any()
    assert (frame[frame["kind"] == "random-target"][NAMES[2:]] == -1).all(axis=None)
    # a sample tells 16 numbers, one for each output of the expert
    assert (frame["samples_per_parameter"] == 16 * frame["samples"] / frame["parameters"]).all()
    assert (frame["aligner"] == "linear").all()
    assert (frame["parameters"] == 16 * 16 + 16).all()


@pytest.mark.parametrize("kind", ["linear", "low-rank", "identity"])
def test_an_expert_stands_in_for_itself(model, capture, kind):
    frame = align(capture, model, [((0, 1), (0, 1))], kind, steps=30)
    own = frame[frame["kind"] == "self"]
    assert len(own) == 1
    assert (own["nmse"] < 1e-3).all()
    assert (own["cosine"] > 0.999).all()


def test_a_layernorm_aligner_starts_near_the_identity_whatever_its_inputs():
    model = tiny_model(hidden=64, experts=2, layers=1)
    capture = fake_capture(model)
    for name, x in capture.samples.items():
        capture.samples[name] = x * torch.linspace(0.1, 9, 64) + torch.linspace(-3, 5, 64)
    capture.samples[0, 1][:, 7] = 2.5  # a feature that never varies
    own = {
        kind: align(capture, model, aligner=kind, steps=40).query("kind == 'self'")["nmse"].max()
        for kind in ("layernorm", "published")
    }
    assert own["layernorm"] < 0.15
    assert own["published"] > 0.5


def test_controls_are_their_closed_forms(model, capture):
    frame = align(capture, model, steps=5)
    assert frame["mean_nmse"].between(1.0, 1.15).all()
    for row in frame[frame["kind"] == "pair"].itertuples():
        source = (row.source_layer, row.source_expert)
        train, held = capture.split(*source)
        x = capture.inputs(*source)[held]
        y = _expert(model, *source)(x).detach()
        variance = (y - y.mean(0)).square().mean()
        error = (_expert(model, row.target_layer, row.target_expert)(x) - y).detach().square().mean()
        assert row.identity_nmse == pytest.approx(float(error / variance), rel=1e-4)
        assert row.source_variance == pytest.approx(float(variance), rel=1e-5)
        assert row.held_out == len(held)
        assert 0 < row.samples < len(train)  # some of the rest are to stop by
        assert row.nmse == pytest.approx(row.mse / row.source_variance)


def test_the_identity_aligner_is_its_own_control(model, capture):
    frame = align(capture, model, aligner="identity")
    pd.testing.assert_series_equal(frame["nmse"], frame["identity_nmse"], check_names=False)
    assert (frame["steps"] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_trained_error_is_below_the_floor(kind):
    model = tiny_model(ff=6)  # six of sixteen directions
    capture = fake_capture(model)
    frame = align(capture, model, aligner=kind, steps=60, lr=0.02, controls=False)
    for row in frame.itertuples():
        source = (row.source_layer, row.source_expert)
        y = _expert(model, *source)(capture.inputs(*source)[capture.split(*source)[1]])
        basis = torch.linalg.qr(_expert(model, row.target_layer, row.target_expert).down)[0]
        floor = (y - y @ basis @ basis.T).square().mean()
        assert 0.01 < floor <= row.mse * (1 + 1e-5)


@settings(max_examples=4, deadline=None)
@given(budget=st.integers(1, 200_000))
def test_no_row_depends_on_the_stacks_or_on_other_pairs(budget):
    model = tiny_model(hidden=8, experts=2, ff=6)
    capture = fake_capture(model, samples=80)
    whole = align(capture, model, steps=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting_module.fit, "__defaults__", (budget,))
        apart = align(capture, model, steps=12)
    pd.testing.assert_frame_equal(whole, apart, rtol=1e-3, atol=1e-5)
    alone = align(capture, model, [((0, 1), (1, 0))], steps=12, controls=False)
    row = whole[(whole[NAMES] == [0, 1, 1, 0]).all(axis=1)].reset_index(drop=True)
    same = [name for name in COLUMNS if name != "over_random"]
    pd.testing.assert_frame_equal(row[same], alone[same], rtol=1e-3, atol=1e-5)


def test_training_helps_and_the_aligners_are_those_scored(capture):
    model, pair = tiny_model(), ((0, 1), (1, 2))
    for name, matrix in _expert(model, 1, 2).matrices.items():
        matrix.data.copy_(_expert(model, 0, 1).matrices[name] + 0.2 * matrix)
    row = align(capture, model, [pair], "linear", steps=200, lr=0.01).query("kind == 'pair'").iloc[0]
    assert row["nmse"] < 0.9 * min(row["identity_nmse"], row["mean_nmse"])
    aligner = fit_aligners(capture, model, [pair], "linear", steps=200, lr=0.01)[pair]
    x = capture.inputs(0, 1)[capture.split(0, 1)[1]]
    with torch.no_grad():
        mse = (_expert(model, 1, 2)(aligner(x)) - _expert(model, 0, 1)(x)).square().mean()
    assert float(mse) == pytest.approx(row["mse"], rel=1e-4)


def test_the_model_is_left_as_it_was(model, capture):
    before = {name: one.clone() for name, one in model.named_parameters()}
    align(capture, model, [((0, 0), (1, 1))], steps=3)
    assert all(torch.equal(one, before[name]) and one.grad is None for name, one in model.named_parameters())


def test_other_text_can_be_scored(model, capture):
    pairs = [((0, 0), (1, 1))]
    same = align(capture, model, pairs, steps=10, score_on=capture)
    pd.testing.assert_frame_equal(same, align(capture, model, pairs, steps=10))
    other = fake_capture(model, seed=5)
    elsewhere = align(capture, model, pairs, steps=10, score_on=other)
    assert (elsewhere["train_nmse"] == same["train_nmse"]).all()
    assert (elsewhere["held_out"] == len(other.split(0, 0)[1])).all()
    pair = elsewhere["kind"] == "pair"  # the expert itself is regained on any text
    assert (elsewhere["nmse"] != same["nmse"])[pair].all()


def test_what_is_beyond_its_controls(model, capture):
    frame = beyond_controls(align(capture, model, [((0, 0), (1, 1))], "linear", steps=100, lr=0.01))
    own = frame[frame["kind"] == "self"].iloc[0]
    assert own["beyond_mean"]
    assert own["beyond_random"]
    assert not own["beyond_identity"]  # nothing is left to better
    assert not own["beyond"]
    assert not frame[frame["kind"] == "random-target"]["beyond_random"].any()
    with pytest.raises(LamellaError, match="over_mean"):
        beyond_controls(frame.drop(columns="over_mean"))


def test_the_seed_ceiling_is_one_where_seeds_rank_alike_and_needs_two(model, capture):
    frame = align(capture, model, steps=5, controls=False)
    ceiling = seed_ceiling(pd.concat([frame, frame.assign(seed=1, nmse=2 * frame["nmse"])]))
    assert ceiling == pytest.approx({"overall": 1.0, "within": 1.0, "seeds": 2.0})
    against = seed_ceiling(pd.concat([frame, frame.assign(seed=1, nmse=-frame["nmse"])]))
    assert against["within"] == pytest.approx(-1.0)
    with pytest.raises(LamellaError, match="two seeds"):
        seed_ceiling(frame)


@pytest.mark.parametrize("kind", ["layernorm", "linear", "low-rank"])
def test_seeds_change_what_is_learnt_and_never_what_is_held_out(model, capture, kind):
    first, second = (align(capture, model, aligner=kind, seed=seed, steps=60, controls=False) for seed in (0, 1))
    assert (first["nmse"] != second["nmse"]).all()
    assert seed_ceiling(pd.concat([first, second]))["overall"] < 1
    for name in ("held_out", "source_variance", "identity_nmse"):
        assert first[name].tolist() == second[name].tolist()


def test_what_no_seed_changes_has_no_ceiling(model, capture):
    both = pd.concat([align(capture, model, aligner="identity", seed=seed, controls=False) for seed in (0, 1)])
    assert all(math.isnan(seed_ceiling(both)[name]) for name in ("overall", "within"))


def test_short_experts_are_named_and_are_targets_still(model, caplog):
    capture = fake_capture(model)
    capture.samples[0, 1], capture.documents[0, 1] = capture.samples[0, 1][:10], capture.documents[0, 1][:10]
    with caplog.at_level(logging.WARNING, "lamella"):
        frame = align(capture, model, steps=3)
    assert "expert 1 of layer 0 has 10 samples" in caplog.text
    assert len(frame.attrs["notes"]) == 1
    assert not (frame[NAMES[:2]] == [0, 1]).all(axis=1).any()
    assert (frame[NAMES[2:]] == [0, 1]).all(axis=1).any()


def test_the_table_is_written_with_its_notes(model, capture, tmp_path):
    frame = align(capture, model, [((0, 0), (1, 1))], steps=3)
    frame.attrs["notes"] = ["one"]
    write_alignment(frame, tmp_path / "alignment.parquet")
    read = pd.read_parquet(tmp_path / "alignment.parquet")
    pd.testing.assert_frame_equal(read, frame)
    assert read.attrs["notes"] == ["one"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": [((0, 9), (0, 1))]}, "Expert 9 of layer 0 is in a pair"),
        ({"pairs": []}, "no pair"),
        ({"aligner": "affine"}, "no aligner 'affine'"),
        ({"aligner": "low-rank", "rank": 17}, "rank 17"),
        ({"steps": 0}, "steps=0"),
        ({"pull": "wasserstein"}, "no pull 'wasserstein'"),
        ({"lr": 1e30, "aligner": "linear"}, None),
    ],
)
def test_bad_settings(model, capture, change, message):
    if message is None:  # diverged states are never the best ones
        assert align(capture, model, steps=20, **change)["nmse"].notna().all()
        return
    with pytest.raises(LamellaError, match=message):
        align(capture, model, **change)


def test_activations_that_are_not_finite_name_their_expert(model):
    capture = fake_capture(model)
    capture.samples[1, 0][3, 2] = torch.nan
    with pytest.raises(LamellaError, match="Expert 0 of layer 1"):
        align(capture, model, steps=3)


def test_a_capture_of_short_experts_only_is_refused(model):
    with pytest.raises(LamellaError, match="No expert can be aligned"):
        align(fake_capture(model, documents=1), model)


def test_a_linear_aligner_starts_from_the_best_multiple_of_the_identity(model, capture):
    pairs = [((0, 0), (0, 0)), ((0, 0), (1, 2))]
    started = fit_aligners(capture, model, pairs, "linear", steps=1, lr=1e-12)
    assert torch.equal(started[pairs[0]].matrix, torch.eye(16))
    diagonal = started[pairs[1]].matrix.diagonal()
    train = capture.inputs(0, 0)[capture.split(0, 0)[0]]
    with torch.no_grad():
        y, target = _expert(model, 0, 0)(train), _expert(model, 1, 2)
        errors = {one: (target(one * train) - y).square().mean() for one in IDENTITY_SCALES}
    torch.testing.assert_close(diagonal, torch.full((16,), min(errors, key=errors.get)))


def test_an_expert_equal_to_another_is_its_replacement_and_one_of_zeros_is_no_source(caplog):
    model = tiny_model()
    with torch.no_grad():
        for name, matrix in _expert(model, 1, 2).matrices.items():
            matrix.copy_(_expert(model, 0, 1).matrices[name])
        _expert(model, 0, 0).down.zero_()
    with caplog.at_level(logging.WARNING, "lamella"):
        frame = align(fake_capture(model), model, steps=3).set_index(NAMES)
    assert frame.loc[(0, 1, 1, 2), "nmse"] < 1e-6
    assert "expert 0 of layer 0 puts out the same for every token" in caplog.text
    assert (0, 0) not in frame.index.droplevel(NAMES[2:])
    assert (frame.xs((0, 0), level=NAMES[2:])["nmse"] > 0.9).all()  # it does no one's work
