import numpy as np
import pandas as pd
import pytest
import torch
from tests.reference.similarity_swap import swapped_model
from tests.tiny_moe import FAMILIES, inputs, inputs_for

from lamella.errors import LamellaError
from lamella.progress import listening
from lamella.similarity.swapping import (
    RANDOM,
    control_swaps,
    expert_pairs,
    layer_pairs,
    layer_tables,
    swap_effects,
    swap_table,
    text_scores,
)


def texts(batch: int = 8, seed: int = 0):
    return [inputs(batch=batch, tokens=12, padding="right", seed=seed)]


@pytest.mark.parametrize("unit", ["expert", "router+experts", "block"])
def test_effects_are_those_of_the_model_with_the_weights_elsewhere(unit):
    model = FAMILIES["qwen2_moe"]()
    swaps = expert_pairs(model, 0, 2)[:3] if unit == "expert" else layer_pairs(model, unit)
    frame = swap_effects(model, texts(), swaps, unit)
    plain = text_scores(model, texts(), "nll").value
    for row, one in zip(frame.to_dict("records"), swaps, strict=True):
        value = text_scores(swapped_model(model, *one, unit, True), texts(), "nll").value
        assert row["baseline"] == plain
        assert row["value"] == value
        assert row["effect"] == pytest.approx(value - plain)
        assert row["low"] <= row["effect"] <= row["high"]
        assert row["texts"] == 8
        first, second = one if unit != "expert" else (one[0][0], one[1][0])
        assert row["distance"] == second - first
        assert (row["first_layer"], row["second_layer"]) == (first, second)
    assert (frame["first_expert"] == -1).all() == (unit != "expert")


def test_one_way():
    model = FAMILIES["mixtral"]()
    frame = swap_effects(model, texts(), [((0, 1), (2, 0))], exchange=False)
    expected = text_scores(swapped_model(model, (0, 1), (2, 0), "expert", False), texts(), "nll").value
    assert frame["value"].item() == expected
    assert not frame["exchange"].item()


def test_controls():
    model = FAMILIES["mixtral"]()
    controls = control_swaps([(0, 1), (0, 2), (2, RANDOM)])
    assert controls == [(0, 0), (1, 1), (2, 2), (0, RANDOM), (1, RANDOM), (2, RANDOM)]
    frame = swap_effects(model, texts(), controls, "block")
    same, random = frame[:3], frame[3:]
    assert (same[["effect", "low", "high"]] == 0).all(axis=None)
    assert (same["p_value"] == 1).all()
    assert (random["effect"] != 0).all()
    assert (random["second_layer"] == RANDOM).all()
    assert random["distance"].isna().all()


def test_neither_batch_size_nor_padding_changes_effects():
    model = FAMILIES["olmoe"](dtype=torch.float64)
    batch = inputs(batch=6, tokens=12, padding="right")
    apart = [
        {name: tensor[row : row + 1, : 12 - row] for name, tensor in batch.items()}  # row r is r tokens shorter
        for row in range(6)
    ]
    left = inputs(batch=6, tokens=12, padding="left")
    for row in range(6):
        left["input_ids"][row, row:] = apart[row]["input_ids"][0]
    swaps = expert_pairs(model, 0, 1)[:2]
    expected = swap_effects(model, [batch], swaps)
    for batches in (apart, [left]):
        pd.testing.assert_frame_equal(swap_effects(model, batches, swaps), expected, rtol=1e-4, atol=1e-6)


def test_accuracy_of_an_encoder_decoder():
    model = FAMILIES["switch_transformers"]()
    batch = inputs_for(model, batch=6, padding="right")
    with torch.no_grad():
        logits = model(**batch).logits
    labels = torch.full_like(batch["labels"], -100)
    labels[:, 0] = logits[:, 0].argmax(-1)
    labels[0, 0] = (labels[0, 0] + 1) % 48
    frame = swap_effects(
        model, [batch | {"labels": labels}], layer_pairs(model, "router+experts"), "router+experts", metric="accuracy"
    )
    assert (frame["baseline"] == 5 / 6).all()
    assert (frame["metric"] == "accuracy").all()
    assert (frame["value"] - frame["baseline"]).tolist() == pytest.approx(frame["effect"].tolist())


def test_behind_aligners():
    model = FAMILIES["mixtral"](dtype=torch.float64)
    one, back = ((0, 0), (1, 1)), ((1, 1), (0, 0))
    for exchange in (True, False):
        plain = swap_effects(model, texts(), [one], exchange=exchange)
        same = {one: lambda x: x, back: lambda x: x}
        aligned = swap_effects(model, texts(), [one], exchange=exchange, aligners=same)
        assert aligned["value"].item() == pytest.approx(plain["value"].item())
        assert aligned["aligned"].item()
        with pytest.raises(LamellaError, match="no aligner for"):
            swap_effects(model, texts(), [one], exchange=exchange, aligners={((0, 3), (1, 3)): lambda x: x})


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path):
    model = FAMILIES["mixtral"]()
    swaps = [*expert_pairs(model, 0, 1)[:4], ((0, 0), RANDOM)]
    expected = swap_effects(model, texts(), swaps)

    def stop(work):
        if work.unit == "swaps" and work.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listening(stop):
        swap_effects(model, texts(), swaps, folder=tmp_path)
    assert len(pd.read_parquet(tmp_path / "swap.parquet")) == 2
    forwards, steps = [], []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with listening(lambda work: steps.append((work.done, work.total)) if work.unit == "swaps" else None):
        actual = swap_effects(model, texts(), swaps, folder=tmp_path)
    handle.remove()
    assert len(forwards) == 1 + 3  # the plain model and what was missing
    assert steps == [(at, 5) for at in range(3, 6)]
    pd.testing.assert_frame_equal(actual, expected)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "swap.parquet"), expected)


def test_a_folder_keeps_the_scores_of_every_text_and_other_kinds_of_swaps(tmp_path):
    model = FAMILIES["mixtral"]()
    swap_effects(model, texts(), [((0, 0), (1, 1))], folder=tmp_path)
    frame = swap_effects(model, texts(), [(0, 1)], "block", folder=tmp_path)
    assert len(frame) == 1
    table = pd.read_parquet(tmp_path / "swap.parquet")
    assert table["unit"].tolist() == ["expert", "block"]
    files = sorted((tmp_path / "swap-texts").iterdir())
    assert len(files) == 2
    kept = pd.read_parquet(next(one for one in files if one.name.startswith("block")))
    assert kept["baseline"].sum() / kept["weight"].sum() == frame["baseline"].item()
    assert kept["score"].sum() / kept["weight"].sum() == frame["value"].item()


def test_a_folder_of_another_model_or_text_is_refused(tmp_path):
    swap_effects(FAMILIES["mixtral"](), texts(), [(0, 1)], "block", folder=tmp_path)
    with pytest.raises(LamellaError, match="another model or other texts"):
        swap_effects(FAMILIES["mixtral"](seed=1), texts(), [(0, 2)], "block", folder=tmp_path)
    for others in (texts(seed=1), texts(batch=7)):
        with pytest.raises(LamellaError, match="another model or other texts"):
            swap_effects(FAMILIES["mixtral"](), others, [(0, 2)], "block", folder=tmp_path)
    next((tmp_path / "swap-texts").iterdir()).unlink()
    with pytest.raises(LamellaError, match="another model or other texts"):
        swap_effects(FAMILIES["mixtral"](), texts(), [(0, 2)], "block", folder=tmp_path)


def test_a_swap_that_breaks_the_model_is_named():
    model = FAMILIES["mixtral"]()
    with torch.no_grad():
        for norm in (model.model.layers[2].input_layernorm, model.model.layers[2].post_attention_layernorm):
            norm.weight.fill_(1e38)  # beyond float32 in the layers before
    model.model.layers[2].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(LamellaError, match="the model with 2 in the place of 0 are not finite"):
        swap_effects(model, texts(), [(0, 2)], "block")


def test_tables_in_the_published_layout():
    model = FAMILIES["mixtral"]()
    layers = swap_effects(model, texts(), [*layer_pairs(model, "block"), (0, RANDOM)], "block")
    table = swap_table(layers)
    assert table.index.tolist() == table.columns.tolist() == [0, 1, 2]
    assert table.isna().to_numpy().tolist() == np.eye(3, dtype=bool).tolist()
    assert table.loc[0, 2] == table.loc[2, 0] == layers["value"][1]
    one_way = swap_table(layers.assign(exchange=False))
    assert (one_way.index.tolist(), one_way.columns.tolist()) == ([0, 1], [1, 2])
    both = layer_tables(pd.concat([layers, layers.assign(exchange=False), layers.assign(unit="expert")]))
    assert list(both) == ["block, nll", "block, nll, one way"]
    pd.testing.assert_frame_equal(both["block, nll"], table)
    experts = swap_effects(model, texts(), expert_pairs(model, 0, 2))
    assert swap_table(experts, "effect").shape == (4, 4)
    assert swap_table(experts, "effect").loc[1, 2] == experts["effect"][6]
    with pytest.raises(LamellaError, match="more than once"):
        swap_table(pd.concat([layers, layers]))
    with pytest.raises(LamellaError, match="two layers"):
        swap_table(pd.concat([experts, experts.assign(second_layer=1)]))
