import math

import pytest
import torch
from tests.reference import similarity_screen as reference
from tests.similarity.screening.drawn import DrawnCapture
from tests.tiny_moe import build

from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.similarity.screening import all_pairs, choose_pairs, screen
from lamella.similarity.screening import table as table_module

NAMES = ["source_layer", "source_expert", "target_layer", "target_expert"]


@pytest.fixture(scope="module")
def model():
    return narrow()


def narrow(hidden_units=12):
    """Experts with fewer hidden units than the model's 16 features, unless told otherwise."""
    return build("qwen2_moe", moe_intermediate_size=hidden_units)


def expert_of(model, name):
    return next(layer for layer in moe_layers(model) if layer.index == name[0]).experts[name[1]]


def pairs_of(frame):
    return [((a, b), (c, d)) for a, b, c, d in frame[NAMES].itertuples(index=False, name=None)]


@pytest.mark.parametrize("rows", [32768, 60, 1])
def test_every_number_is_the_obvious_one(model, monkeypatch, rows):
    """Sources of unequal length, in one group, in several, and each on its own."""
    monkeypatch.setattr(table_module, "_ROWS", rows)
    capture = DrawnCapture(model, {(0, 1): 7, (2, 0): 90, (1, 3): 5})
    frame = screen(capture, model)
    assert pairs_of(frame) == all_pairs(capture.experts)
    assert len(frame) == 12 * 11
    shares = capture.coactivation.set_index(["layer", "expert", "other"])["share"]
    for row, (source, target) in zip(frame.itertuples(), pairs_of(frame), strict=True):
        x, one, two = capture.held_out(*source), expert_of(model, source), expert_of(model, target)
        assert row.held_out == len(x)
        with torch.no_grad():
            seen = capture.inputs(*source)[capture.split(*source)[0]]
            assert row.predicted == pytest.approx(
                reference.predicted(x, one(x), two, seen, one(seen), one.down), rel=1e-3
            )
            assert row.floor == pytest.approx(reference.floor(one(x), two.down), rel=1e-4)
            assert row.cka_distance == pytest.approx(1 - reference.cka(one(x), two(x)), rel=1e-4, abs=1e-6)
        assert row.weight_distance == pytest.approx(table_module.weight_distance(one, two))
        if source[0] == target[0]:
            assert row.coactivation == shares[source[0], source[1], target[1]]
        else:
            assert math.isnan(row.coactivation)


def test_some_pairs_have_the_numbers_they_have_among_all(model):
    capture = DrawnCapture(model)
    everything = screen(capture, model)
    some = [((2, 1), (0, 3)), ((0, 0), (2, 2)), ((0, 0), (0, 1)), ((2, 1), (0, 3))]
    chosen = screen(capture, model, some)
    assert pairs_of(chosen) == sorted(set(some))
    among = everything[[pair in some for pair in pairs_of(everything)]].reset_index(drop=True)
    assert (chosen - among).abs().max().max() < 1e-6


def test_only_the_measures_asked_for(model):
    frame = screen(DrawnCapture(model), model, measures=["floor"])
    assert frame["floor"].notna().all()
    assert frame[["predicted", "cka_distance", "weight_distance", "coactivation"]].isna().all().all()
    with pytest.raises(LamellaError, match="'speed' is not a measure"):
        screen(DrawnCapture(model), model, measures=["floor", "speed"])


def test_an_expert_that_hardly_fired_is_named_and_not_measured(model, caplog):
    capture = DrawnCapture(model, {(0, 1): 0, (1, 2): 3, (2, 3): 4})
    frame = screen(capture, model).set_index(NAMES)
    for source in ((0, 1), (1, 2)):  # no and one held-out token
        assert frame.loc[source][["predicted", "floor", "cka_distance"]].isna().all().all()
        assert frame.loc[source]["weight_distance"].notna().all()
        assert f"expert {source[1]} of layer {source[0]}" in caplog.text
    assert "expert 3 of layer 2" not in caplog.text
    rest = frame.drop(index=[(0, 1), (1, 2)])
    assert rest[["predicted", "floor", "cka_distance"]].notna().all().all()
    assert (rest.loc[(2, 3)]["held_out"] == 2).all()


def test_an_expert_of_zeros_does_not_vary(caplog):
    model = narrow()
    torch.nn.init.zeros_(expert_of(model, (1, 0)).down)
    frame = screen(DrawnCapture(model), model).set_index(NAMES)
    assert frame.loc[(1, 0)]["floor"].isna().all()
    assert "expert 0 of layer 1" in caplog.text
    # it reaches nothing but zero: more than all of the variance is left
    assert (frame.xs((1, 0), level=("target_layer", "target_expert"))["floor"] >= 1).all()


def test_activations_that_are_not_finite_are_refused():
    model = narrow()
    with torch.no_grad():
        expert_of(model, (1, 0)).up[0, 0] = torch.nan
    with pytest.raises(LamellaError, match="Expert 0 of layer 1 has an input or output that is not finite"):
        screen(DrawnCapture(model), model)


def test_an_expert_that_was_not_captured_is_named(model):
    with pytest.raises(LamellaError, match="Expert 9 of layer 0 is in a pair"):
        screen(DrawnCapture(model), model, [((0, 1), (0, 9))])


def test_the_screen_leaves_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    screen(DrawnCapture(model), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("by", ["predicted", "floor"])
def test_the_pairs_chosen_have_the_least_predicted_error_or_the_lowest_floors(model, by):
    frame = screen(DrawnCapture(model, {(0, 1): 0}), model)
    chosen = choose_pairs(frame if by == "predicted" else frame.drop(columns="predicted"), per_source=3)
    assert len(chosen) == 3 * 11  # a source that was not measured has none
    assert chosen == sorted(chosen)
    floors = frame.set_index(NAMES)[by]
    for source in {source for source, _ in chosen}:
        kept = [floors[(*source, *target)] for other, target in chosen if other == source]
        assert sorted(kept) == sorted(floors.loc[source])[:3]


def test_where_every_floor_is_zero_the_cka_distance_chooses():
    model = narrow(20)
    frame = screen(DrawnCapture(model), model, measures=["floor", "cka_distance"])
    assert (frame["floor"] == 0).all()
    cka = frame.set_index(NAMES)["cka_distance"]
    for source, target in choose_pairs(frame, per_source=1):
        assert cka[(*source, *target)] == cka.loc[source].min()


def test_more_pairs_than_there_are_is_all_of_them(model):
    capture = DrawnCapture(model)
    assert choose_pairs(screen(capture, model), per_source=99) == all_pairs(capture.experts)
    with pytest.raises(LamellaError, match="at least 1"):
        choose_pairs(screen(capture, model), per_source=0)


def test_without_a_floor_nothing_is_chosen(model):
    frame = screen(DrawnCapture(model), model, measures=["coactivation"])
    with pytest.raises(LamellaError, match="no predicted error and no floor to choose pairs by"):
        choose_pairs(frame, per_source=1)


def test_a_model_in_bfloat16_is_measured_as_an_alignment_would():
    model = narrow().to(torch.bfloat16)
    capture = DrawnCapture(model)
    frame = screen(capture, model).set_index(NAMES)
    with torch.no_grad():
        y = expert_of(model, (0, 1))(capture.held_out(0, 1).bfloat16()).float()
        expected = reference.floor(y, expert_of(model, (2, 3)).down)
    assert frame.loc[(0, 1, 2, 3)]["floor"] == pytest.approx(expected, rel=1e-4)
    assert frame[["floor", "cka_distance", "weight_distance"]].notna().all().all()
