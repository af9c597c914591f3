import json
import math
from functools import partial

import pandas as pd
import pytest
import torch
from tests.similarity.compression.planted import aligners, captured, same_state, state, table, texts_of, with_twins
from tests.tiny_moe import FAMILIES, build, inputs_for

from lamella.backbones.moe import moe_layers, watch_dispatch
from lamella.errors import LamellaError
from lamella.progress import listening
from lamella.similarity.compression import (
    Settings,
    advised,
    by_settings,
    compress,
    compression_curve,
    largest_compression,
    rerouting_table,
    verdict,
)

MODELS = "measuring smaller models"
COMPRESSION = [
    "method", "budget", "parameters", "domain", "perplexity", "baseline", "ratio", "low", "high", "experts_left",
    "seed", "experts", "parameters_before", "bytes", "gone", "chosen_on", "choices_gone",
    "captured_gone",
    "scope", "weighted", "refit", "distil",
]  # fmt: skip
ONE_LESS = 11 / 12  # of three layers with four experts each
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


def choices(model, batches, experts):
    """The share of a text's choices that fall on some experts, mean over layers."""
    shares, seen = [], []
    with watch_dispatch(model, moe_layers(model), seen.append), torch.no_grad():
        for batch in batches:
            model(**batch)
    for layer in moe_layers(model):
        picked = torch.cat([one.routing.indices[one.real].flatten() for one in seen if one.layer.index == layer.index])
        mine = torch.tensor([expert for index, expert in experts if index == layer.index])
        shares.append(float(torch.isin(picked, mine).double().mean()))
    return sum(shares) / len(shares)


def test_a_criterion_that_cannot_reach_a_budget_is_named_and_the_curve_goes_on():
    """Six experts in three groups, each chosen by its two best, cannot be dropped; replaced they can be."""
    model = build("deepseek_v3")
    taken, texts, refused, told = captured(model), texts_of(model), [], []
    with listening(lambda work: told.append((work.name, work.done, work.total))):
        frame = compression_curve(
            model, taken, domains(model), [0.9, 0.5], ["reap", "stand-in"], texts=texts, refused=refused.append
        )
    assert set(frame["method"]) == {"stand-in"}
    assert [line.split(".")[0] for line in refused] == ["reap cannot keep 90", "reap cannot keep 50"]
    assert all("at most 0 can go by reap" in line for line in refused)
    assert [of for of in told if of[0] == MODELS] == [(MODELS, done, 4) for done in range(1, 5)]
    with pytest.raises(LamellaError, match="at most 0 can go by reap"), pytest.warns(match="reap cannot keep"):
        compression_curve(model, taken, domains(model), [0.5], ["reap"], texts=texts)


def test_the_curve_measures_each_compressed_model(tmp_path):
    model = with_twins()
    taken, texts, before, told = captured(model, tmp_path / "capture"), texts_of(model), state(model), []
    with listening(lambda work: told.append((work.name, work.done, work.total))):
        frame = compression_curve(
            model, taken, domains(model), [1.0, ONE_LESS, 0.5], ["stand-in", "reap", "random"], seeds=(3, 4),
            texts=texts, chosen_on=["in"],
        )  # fmt: skip
    assert list(frame.columns) == COMPRESSION
    assert same_state(model, before)
    assert len(frame) == (2 * 3 + 3 * 2) * 2
    assert [of for of in told if of[0] == MODELS] == [(MODELS, done, 12) for done in range(1, 13)]
    assert set(frame[frame["method"] == "random"]["seed"]) == {3, 4}
    assert (frame["chosen_on"] == (frame["domain"] == "in")).all()
    whole = frame[frame["budget"] == 1.0]
    assert (whole[["ratio", "low", "high"]] == 1).all().all()
    assert set(whole["gone"]) == {"[]"}
    for row in frame[(frame["budget"] == 0.5)].itertuples():
        small = compress(model, taken, 0.5, criterion=row.method, seed=row.seed, texts=texts)
        expected = perplexity(small.model, domains(model)[row.domain])
        assert row.perplexity == pytest.approx(expected, rel=1e-5)
        assert row.baseline == pytest.approx(perplexity(model, domains(model)[row.domain]), rel=1e-5)
        assert row.ratio == pytest.approx(row.perplexity / row.baseline, rel=1e-9)
        assert row.low <= row.ratio <= row.high
        assert (row.parameters, row.experts_left, row.experts) == (small.report.parameters, 6, 12)
        assert [tuple(name) for name in json.loads(row.gone)] == small.report.gone
        assert row.bytes == (row.parameters_before - row.parameters) * 8
        gone = [tuple(name) for name in json.loads(row.gone)]
        assert row.captured_gone == pytest.approx(sum(taken.shares[name] for name in gone) / 3)
        assert row.choices_gone == pytest.approx(choices(model, domains(model)[row.domain], gone))
    twins = frame[(frame["budget"] == ONE_LESS) & (frame["method"] == "stand-in")]
    assert (twins["ratio"] - 1).abs().max() < 1e-6
    actual = largest_compression(frame).set_index(["method", "domain"])
    assert actual.loc[("stand-in", "in"), "removed"] >= 1 - ONE_LESS - 1e-9


def rows(ratios, experts=12, gone=((0, 3), (0, 1), (2, 2))):
    """A curve from ``{(criterion, budget, domain): ratio}``; experts were chosen on the domain "news"."""
    return pd.DataFrame(
        [
            {
                "method": method, "budget": budget, "domain": domain, "ratio": ratio, "low": ratio - 0.01,
                "high": ratio + 0.01, "experts": experts, "experts_left": round(budget * experts), "seed": 0,
                "parameters_before": 1000, "parameters": 1000 - round(500 * (1 - budget)), "bytes": 2_000_000,
                "gone": json.dumps(gone), "chosen_on": domain == "news",
            }
            for (method, budget, domain), ratio in ratios.items()
        ]
    )  # fmt: skip


def test_one_sentence_says_what_can_go_at_which_cost_in_the_worst_domain():
    ratios = {
        ("reconstruction", 0.75, "news"): 1.02, ("reconstruction", 0.75, "films"): 1.03,
        ("reconstruction", 0.75, "glosses"): 1.077, ("reconstruction", 0.5, "news"): 1.3,
        ("reconstruction", 0.5, "films"): 1.3, ("reconstruction", 0.5, "glosses"): 1.3,
        ("random", 0.75, "news"): 1.4, ("random", 0.5, "news"): 2.0,
        ("lucky", 0.75, "news"): 1.0, ("lucky", 0.5, "news"): 1.0,  # the best on what is measured is not chosen by it
    }  # fmt: skip
    sentence, names, others = verdict(rows(ratios))
    assert sentence == (
        "You can drop 3 of 12 experts (12.5% of the parameters, 0.002 GB) at +2.0% perplexity on news [+1.0%, +3.0%], "
        "within the 5% allowed, and +7.7% perplexity on glosses [+6.7%, +8.7%], the worst of 2 texts that they were "
        "not chosen on (by reconstruction, keeping 75.0% of the experts)."
    )
    assert names == "They are layer 0: 3, 1; layer 2: 2."
    assert others.endswith("at that budget: lucky 1.000, reconstruction 1.020, random 1.400.")
    assert advised(rows(ratios)) == ("reconstruction", 0.75, True)
    assert advised(rows(ratios), within=0.025) == ("reconstruction", 0.75, False)  # not surely: up to 1.03
    costly, none, *_ = verdict(rows(ratios), within=0.01)
    assert costly.startswith(
        "To drop 3 of 12 experts (12.5% of the parameters, 0.002 GB) costs +2.0% perplexity on news"
    )
    assert "[+1.0%, +3.0%], more than the 1% allowed, and +7.7% perplexity on glosses" in costly
    assert none.startswith("None of the 2 budgets that were tried is surely within what is allowed: keep more")
    (unsure, *_) = verdict(rows(ratios), within=0.025)
    assert "[+1.0%, +3.0%], perhaps more than the 2.5% allowed, and" in unsure
    asked, none, *_ = verdict(rows({("reap", 0.75, "films"): 1.3}))  # one budget, on a text they were not chosen on
    assert "and +30.0% perplexity on films [+29.0%, +31.0%] that they were not chosen on, more than the 5%" in asked
    assert none.startswith("That is not surely within")
    (alone, *_) = verdict(rows({("merge", 0.75, "news"): 1.0}))
    assert alone.startswith("You can merge 3 of 12 experts")
    assert "; no text was measured that they were not chosen on" in alone
    assert verdict(rows({("reap", 1.0, "news"): 1.0})) == ["Nothing was compressed."]


def test_rows_of_several_settings_are_not_averaged():
    even, uneven = (rows({("reap", 0.75, "news"): ratio}).assign(scope=scope, distil=int(scope == "layer"), refit=True)
                    for scope, ratio in (("layer", 1.04), ("model", 1.01)))  # fmt: skip
    both = pd.concat([even, uneven])
    assert list(by_settings(both)) == ["scope layer, distil 1", "scope model, distil 0"]
    said = verdict(both)
    assert said[0] == f"scope layer, distil 1: {verdict(even)[0]}"
    assert said[3] == f"scope model, distil 0: {verdict(uneven)[0]}"
    assert list(by_settings(even)) == [""]
    with pytest.raises(LamellaError, match="rows of more than one scope"):
        largest_compression(both)


def test_a_text_that_misses_domains_is_named_where_their_experts_go():
    frame = rows({("reap", 0.75, "news"): 1.02, ("reap", 0.75, "films"): 1.4, ("reap", 0.75, "glosses"): 1.3})
    usage = {"news": 0.1, "films": 0.4, "glosses": 0.05}
    frame = frame.assign(choices_gone=frame["domain"].map(usage), captured_gone=0.1)
    assert verdict(frame)[1] == (
        "The captured text misses films: films gives 40% of its choices to the experts that go, the captured text 10%. "
        "Capture text of every domain that the model is for."
    )
    assert len(verdict(frame, within=0.5)) == 3
    assert not any("misses" in sentence for sentence in verdict(frame.assign(chosen_on=True)))
    assert len(verdict(frame.drop(columns="choices_gone"))) == 3


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
    taken = captured(model)
    settings = {"settings": Settings("reap", "layer")}
    with pytest.raises(LamellaError, match="at least one budget"):
        compression_curve(model, taken, domains(model), [], ["random"], **settings)
    with pytest.raises(LamellaError, match="no text"):
        compression_curve(model, taken, {}, [0.5], ["random"], **settings)
    with pytest.raises(LamellaError, match="in the domain out"):
        compression_curve(model, taken, {**domains(model), "out": []}, [0.5], ["random"], **settings)
    with pytest.raises(LamellaError, match="budget=2"):
        compression_curve(model, taken, domains(model), [0.5, 2], ["random"], **settings)
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
