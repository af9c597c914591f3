from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from lamella.errors import LamellaError
from lamella.similarity.alignment import seed_ceiling
from lamella.similarity.pairs import NAMES
from lamella.similarity.reliability import control_table, reliability, screen_table, truth_auc

EXPERTS = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
KINDS = {(0, 0): "news", (0, 1): "news", (0, 2): "law", (0, 3): "law", (1, 0): "news"}


def alignment(nmse, seeds=(0, 1)):
    rows = []
    for seed in seeds:
        for source in EXPERTS:
            for target in [*EXPERTS, (-1, -1)]:
                kind = "self" if source == target else "random-target" if target == (-1, -1) else "pair"
                value = nmse(source, target) + 0.001 * seed
                rows.append(dict(zip(NAMES, (*source, *target), strict=True)) | {
                    "kind": kind, "aligner": "linear", "seed": seed, "nmse": value, "mse": value * (1 + source[1]),
                    "source_variance": 1.0 + source[1], "identity_nmse": 1.5, "mean_nmse": 1.0,
                    "samples_per_parameter": 2.0, "over_mean": value - 1, "over_identity": value - 1.5,
                    "over_random": value - 0.9,
                })  # fmt: skip
    return pd.DataFrame(rows)


def by_kind(source, target):
    if source == target:
        return 0.0
    if target == (-1, -1):
        return 0.9
    return 0.2 + 0.01 * target[1] if KINDS[source] == KINDS[target] else 0.6 + 0.01 * target[1]


def test_controls_stand_apart_from_pairs():
    table = control_table(alignment(by_kind)).set_index("control")
    assert table.loc["itself", "median"] < 0.01
    assert table.loc["a random expert", "median"] == pytest.approx(0.9005)
    assert table.loc["all pairs", "rows"] == 2 * 20
    assert table.loc["pairs in one layer", "rows"] == 2 * 12
    assert table.loc["the mean", "median"] == 1.0


def test_the_reverse_direction_is_compared_pair_by_pair():
    flat = control_table(alignment(lambda s, t: 0.3)).set_index("control")
    assert flat.loc["difference of both directions", "median"] == 0.0
    assert flat.loc["difference of both directions", "rows"] == 2 * 10
    down = alignment(lambda s, t: 0.5 if s < t else 0.3, seeds=(0,))
    table = control_table(down[~((down["source_layer"] == 1) & (down["target_expert"] == 0))]).set_index("control")
    row = table.loc["difference of both directions"]
    assert (row["rows"], row["median"], row["low"]) == (9, pytest.approx(0.2), pytest.approx(0.2))


def test_a_screen_meets_the_same_noise_as_the_ceiling():
    """A screen as good as a seed, whose noise is as large, ranks as well as the ceiling says."""
    rng = np.random.default_rng(0)
    truth = {(s, t): rng.normal() for s in EXPERTS for t in EXPERTS}
    runs = []
    for _ in range(24):
        drawn = [alignment(lambda s, t: truth.get((s, t), 0) + rng.normal(), seeds=(seed,)) for seed in range(3)]
        screened = (
            drawn[2]
            .loc[drawn[2]["kind"] == "pair", NAMES]
            .assign(floor=drawn[2]["nmse"], cka_distance=np.nan, weight_distance=0.5)
        )
        table = screen_table(pd.concat(drawn[:2]), screened).set_index("measure")
        assert list(table.index) == ["floor", "another seed", "chance"]  # the others rank nothing
        runs.append(table.loc[["floor", "another seed"], ["within", "lost, 1 kept"]].to_numpy())
        assert table.loc["another seed", "within"] == seed_ceiling(pd.concat(drawn[:2]))["within"]
    screens, ceilings = np.mean(runs, axis=0)
    assert screens == pytest.approx(ceilings, abs=0.1)
    assert "ceiling" not in reliability(drawn[0], screened)
    assert list(screen_table(drawn[0], screened)["measure"]) == ["floor", "chance"]


def test_what_a_screen_loses_is_the_error_of_the_best_that_it_keeps():
    aligned = alignment(by_kind, seeds=(0,))
    pairs = aligned[aligned["kind"] == "pair"]
    right, wrong = (pairs[NAMES].assign(floor=sign * pairs["nmse"], cka_distance=np.nan) for sign in (1, -1))
    lost = [f"lost, {kept} kept" for kept in (1, 2, 4, 8)]
    assert screen_table(aligned, right).set_index("measure").loc["floor", lost].tolist() == [0, 0, 0, 0]
    backwards = screen_table(aligned, wrong).set_index("measure")
    # each expert has four others, of which only one or two are of its kind
    expected = {kept: [] for kept in (1, 2, 4, 8)}
    by_chance = {kept: [] for kept in expected}
    for _, rows in pairs.groupby(NAMES[:2]):
        errors = sorted(rows["nmse"])
        for kept in expected:
            expected[kept].append(min(errors[-kept:]) - errors[0])
            drawn = [min(some) for some in combinations(errors, min(kept, 4))]
            by_chance[kept].append(np.mean(drawn) - errors[0])
    assert backwards.loc["floor", lost].tolist() == pytest.approx([np.mean(one) for one in expected.values()])
    assert backwards.loc["chance", lost].tolist() == pytest.approx([np.mean(one) for one in by_chance.values()])


def test_there_is_no_ceiling_where_seeds_change_nothing():
    same = alignment(by_kind)
    facts = reliability(same.assign(nmse=alignment(by_kind, seeds=(0, 0))["nmse"].to_numpy()))
    assert not {"ceiling", "ceiling within"} & set(facts)


def test_it_counts_what_is_beyond_and_what_is_below_the_floor():
    facts = alignment(lambda s, t: 0.95 if t == (0, 3) and s != t else by_kind(s, t))
    names = facts.loc[(facts["kind"] == "pair") & (facts["seed"] == 0), NAMES].reset_index(drop=True)
    screened = names.assign(floor=0.1, cka_distance=0.5, weight_distance=0.5)
    screened.loc[0, "floor"] = 0.9
    result = reliability(facts, screened)
    assert result["beyond"] == pytest.approx(16 / 20)
    assert result["below the floor"] == 2  # the first pair, both seeds
    assert result["ceiling"] == pytest.approx(1.0)
    assert "cka_distance" not in result  # it ranks nothing


def test_the_auc_of_a_measure_that_knows_the_kinds_is_one_and_of_a_blind_one_a_half():
    perfect = truth_auc(alignment(by_kind), KINDS)
    assert (perfect["auc"], perfect["low"], perfect["high"]) == (1.0, 1.0, 1.0)
    assert perfect["experts"] == 4  # the one alone in its layer has no replacement there
    blind = truth_auc(alignment(lambda s, t: 0.5), KINDS)
    assert blind["auc"] == 0.5
    assert truth_auc(alignment(lambda s, t: 1 - by_kind(s, t)), KINDS)["auc"] == 0.0


def test_the_auc_is_the_chance_counted_by_hand():
    values = {(0, 1): 0.3, (0, 2): 0.2, (0, 3): 0.3}  # replacements of expert (0, 0): own kind first
    rng = np.random.default_rng(0)
    facts = alignment(lambda s, t: values.get(t, 0.0) if s == (0, 0) else rng.uniform(), seeds=(0,))
    facts = facts[(facts["source_layer"] == 0) & (facts["source_expert"] == 0)]
    assert truth_auc(facts, KINDS)["auc"] == pytest.approx((0 + 0.5) / 2)


def test_kinds_without_a_second_expert_are_refused():
    with pytest.raises(LamellaError, match="own kind"):
        truth_auc(alignment(by_kind), {name: str(name) for name in EXPERTS})
