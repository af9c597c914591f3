import json
import math
from functools import partial

import pandas as pd
import pytest
import torch
from tests.similarity.compression.planted import Counts, same_state, state, table, with_twins
from tests.similarity.compression.test_compression import ONE_LESS, aligners
from tests.tiny_moe import FAMILIES, inputs_for

from lamella.errors import LamellaError
from lamella.similarity.compression import METHODS, compress, compression_curve, largest_compression, rerouting_table

COMPRESSION = [
    "method", "budget", "parameters", "domain", "perplexity", "baseline", "ratio", "low", "high", "experts_left",
    "seed",
]  # fmt: skip
REROUTING = ["how", "what", "experts", "domain", "perplexity", "baseline", "ratio", "low", "high", "seed"]


def domains(model):
    return {
        name: [inputs_for(model, batch=4, padding="right", seed=seed + at) for at in (0, 1)]
        for name, seed in {"in": 0, "out": 5}.items()
    }


@torch.no_grad()
def perplexity(model, batches):
    """By the model's own loss on single documents."""
    nats = tokens = 0.0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[mask.bool()][None]
            if ids.shape[1] > 1:
                nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
                tokens += ids.shape[1] - 1
    return math.exp(nats / tokens)


@torch.no_grad()
def test_the_curve_measures_each_compressed_model():
    model = with_twins()
    before, told = state(model), []
    frame = compression_curve(
        model, table(model), domains(model), [1.0, ONE_LESS, 0.5], seeds=(3, 4), capture=Counts(model),
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert list(frame.columns) == COMPRESSION
    assert same_state(model, before)
    assert len(frame) == (3 * 3 + 3 * 2) * 2
    assert told == [(done, 15) for done in range(1, 16)]
    assert set(frame["method"]) == set(METHODS)
    assert set(frame[frame["method"] == "random"]["seed"]) == {3, 4}
    whole = frame[frame["budget"] == 1.0]
    assert (whole["ratio"] == 1).all()
    assert (whole["low"] == 1).all()
    assert (whole["high"] == 1).all()
    for row in frame[(frame["budget"] == 0.5)].itertuples():
        small = compress(model, table(model), 0.5, method=row.method, seed=row.seed, capture=Counts(model))
        expected = perplexity(small.model, domains(model)[row.domain])
        assert row.perplexity == pytest.approx(expected, rel=1e-5)
        assert row.baseline == pytest.approx(perplexity(model, domains(model)[row.domain]), rel=1e-5)
        assert row.ratio == pytest.approx(row.perplexity / row.baseline, rel=1e-9)
        assert row.low <= row.ratio <= row.high
        assert row.low < row.high
        assert (row.parameters, row.experts_left) == (small.report.parameters, 6)
    twins = frame[(frame["budget"] == ONE_LESS) & (frame["method"] == "similarity")]
    assert (twins["ratio"] - 1).abs().max() < 1e-6
    actual = largest_compression(frame).set_index(["method", "domain"])
    assert actual.loc[("similarity", "in"), "removed"] >= 1 - ONE_LESS - 1e-9
    assert actual.loc[("similarity", "in"), "low"] >= 1 - ONE_LESS - 1e-9


def curve(ratios, spread=0.005, **columns):
    rows = [
        {"method": "similarity", "budget": budget, "domain": "in", "ratio": ratio, "low": ratio - spread,
         "high": ratio + spread, "seed": 0, "parameters": 1, "perplexity": 1.0, "baseline": 1.0, "experts_left": 1}
        for budget, ratio in ratios.items()
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def test_as_much_can_go_as_no_smaller_compression_forbids():
    ratios = {0.5: 1.001, 0.6: 1.02, 0.7: 1.012, 0.8: 1.008, 0.9: 1.001}
    (row,) = largest_compression(curve(ratios)).itertuples()
    assert row.removed == pytest.approx(0.2)
    assert row.low == pytest.approx(0.1)
    assert row.high == pytest.approx(0.3)
    assert row.largest == pytest.approx(0.5)
    assert largest_compression(curve({0.9: 1.2, 0.5: 1.0}))["removed"].item() == 0
    assert largest_compression(curve({0.9: 1.2}), within=0.5)["removed"].item() == pytest.approx(0.1)
    within = largest_compression(curve({0.9: 1.0, 0.75: 1.001}))  # nothing is known beyond what was tried
    assert within["removed"].item() == within["low"].item() == within["largest"].item() == 0.25
    assert math.isnan(within["high"].item())
    both = pd.concat([curve({0.9: 1.0, 0.8: 1.03}), curve({0.9: 1.0, 0.8: 0.98}, seed=1)])
    assert largest_compression(both)["removed"].item() == pytest.approx(0.2)


def test_bad_input_of_curves_is_named():
    model = FAMILIES["mixtral"]()
    with pytest.raises(LamellaError, match="at least one budget"):
        compression_curve(model, None, domains(model), [], ["random"])
    with pytest.raises(LamellaError, match="no text"):
        compression_curve(model, None, {}, [0.5], ["random"])
    with pytest.raises(LamellaError, match="in the domain out"):
        compression_curve(model, None, {**domains(model), "out": []}, [0.5], ["random"])
    with pytest.raises(LamellaError, match="budget=2"):
        compression_curve(model, None, domains(model), [0.5, 2], ["random"])
    with pytest.raises(LamellaError, match="lacks the column budget"):
        largest_compression(curve({0.5: 1.0}).drop(columns="budget"))
    with pytest.raises(LamellaError, match="within"):
        largest_compression(curve({0.5: 1.0}), within=-1)


@pytest.mark.parametrize("settings", [{"what": "dropped"}, {"what": "masked"}, {"what": "full", "capacity": 0}])
def test_rerouting_is_compared_with_dropping_and_the_next_choice(settings):
    model = with_twins()
    frame = rerouting_table(
        model, table(model), [(1, 0)], domains(model), aligner=partial(aligners, "identity"), **settings
    )
    assert list(frame.columns) == REROUTING
    assert sorted(frame["how"]) == sorted(["none", "similar", "similar+aligner", "drop", "next-choice"] * 2)
    assert set(frame["what"]) == {settings["what"]}
    assert json.loads(frame["experts"][0]) == [[1, 0]]
    ratio = frame.set_index(["how", "domain"])["ratio"]
    assert (ratio["none"] == 1).all()
    assert (ratio["similar"] - 1).abs().max() < 1e-6
    assert (ratio["similar+aligner"] - 1).abs().max() < 1e-6
    assert (ratio["drop"] - 1).abs().min() > 1e-6
    assert (ratio["next-choice"] - 1).abs().min() > 1e-6
    baseline = frame.groupby("domain")["baseline"].first()
    assert baseline["in"] == pytest.approx(perplexity(model, domains(model)["in"]), rel=1e-5)


def test_without_aligners_no_row_has_them():
    model = with_twins()
    frame = rerouting_table(model, table(model), [(1, 0)], domains(model))
    assert set(frame["how"]) == {"none", "similar", "drop", "next-choice"}
