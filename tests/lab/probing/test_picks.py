"""Picks of runs, and their correlation with what layers hold, against tables worked out by hand."""

import itertools
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from tests.lab.tiny_runs import MOLA, MOLEX
from transformers import BertConfig, BertModel

from lamella.errors import LamellaError
from lamella.lab.data import load_backbone
from lamella.lab.probing.picks import Picks, pick_correlations, picks_of, random_tables


def picks(shares, allowed=None):
    """Of one run, (depths, blocks), or of several, (runs, depths, blocks)."""
    shares = np.asarray(shares, float)
    shares = shares.reshape(-1, *shares.shape[-2:])
    allowed = np.ones_like(shares[0], bool) if allowed is None else np.asarray(allowed, bool)
    return Picks("run", "minilm", tuple(range(shares.shape[1])), shares, allowed, pd.DataFrame())


def certain(*values):
    """Scores of two seeds and three rows that are all alike, (blocks, seeds, rows)."""
    return np.broadcast_to(np.asarray(values, float)[:, None, None], (len(values), 2, 3))


def test_a_correlation_is_that_of_the_table_worked_out_by_hand():
    # picked .2, .3, .5 in the mean of two depths, ranks 1 2 3
    found = picks([[0.3, 0.2, 0.5], [0.1, 0.4, 0.5]])
    assert found.by_layer.tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert found.itself == pytest.approx((0.3 + 0.4) / 2)
    table = pick_correlations(found, {("a", "selectivity"): certain(1, 2, 9), ("b", "selectivity"): certain(9, 2, 1)})
    assert table["rho"].tolist() == pytest.approx([1.0, -1.0])
    assert table["low"].tolist() == table["high"].tolist() == pytest.approx([1.0, -1.0])  # no row says otherwise
    assert pick_correlations(found, {("c", "accuracy"): certain(2, 1, 9)})["rho"].tolist() == pytest.approx([0.5])
    (ties,) = pick_correlations(found, {("d", "accuracy"): certain(1, 1, 9)})["rho"]
    assert ties == pytest.approx(3 / np.sqrt(12))  # ranks 1.5 1.5 3 with 1 2 3: 1.5 / sqrt(2 * 1.5)


def test_random_tables_are_those_of_all_permutations():
    shares, values = [0.1, 0.2, 0.3, 0.4], [1.0, 3.0, 2.0, 4.0]
    every = [spearmanr(one, values).statistic for one in itertools.permutations(shares)]
    exact = np.mean(np.asarray(every) >= spearmanr(shares, values).statistic - 1e-12)
    row = pick_correlations(picks([shares]), {("a", "selectivity"): certain(*values)}).iloc[0]
    assert row["rho"] == pytest.approx(0.8)
    assert row["p"] == pytest.approx(exact, abs=0.02)
    assert row["random_low"] == pytest.approx(-row["random_high"], abs=0.05)


def test_random_picks_fall_on_candidates_alone():
    found = picks([[0.0, 0.7, 0.3], [0.0, 0.0, 1.0]], [[0, 1, 1], [0, 0, 1]])
    tables = random_tables(found, np.random.default_rng(0))
    assert set(map(tuple, tables.round(3))) == {(0.0, 0.35, 0.65), (0.0, 0.15, 0.85)}
    assert found.table.values.tolist() == [[0, 1, 0.7], [0, 2, 0.3], [1, 2, 1.0]]


def test_an_interval_is_over_rows_and_seeds():
    """Beside one that draws both by hand, of scores whose order is not sure."""
    drawn = np.random.default_rng(0)
    scores = (drawn.random((8, 3, 40)) < np.linspace(0.45, 0.6, 8)[:, None, None]).astype(float)
    row = pick_correlations(picks([np.arange(1, 9) / 36]), {("a", "selectivity"): scores}).iloc[0]
    slow = [
        spearmanr(scores[:, drawn.integers(3, size=3)][:, :, drawn.integers(40, size=40)].mean((1, 2)), range(8))
        for _ in range(1000)
    ]
    ends = np.quantile([one.statistic for one in slow], [0.025, 0.975])
    assert [row["low"], row["high"]] == pytest.approx(ends, abs=0.07)


def test_several_runs_are_their_mean_and_agreeing_is_no_further_evidence():
    """Three runs alike have the p-value of one; of unlike ones the interval spans what each of them says."""
    values = {("a", "selectivity"): certain(1, 2, 3, 4)}
    one = [[0.1, 0.2, 0.3, 0.4]]
    alone, thrice = (pick_correlations(picks(shares), values) for shares in (one, [one, one, one]))
    pd.testing.assert_frame_equal(alone, thrice)
    unlike = picks([one, [[0.7, 0.2, 0.1, 0.0]]])
    assert unlike.by_layer.tolist() == pytest.approx([0.4, 0.2, 0.2, 0.2])
    row = pick_correlations(unlike, values).iloc[0]
    assert (row["low"], row["high"]) == pytest.approx((-1.0, 1.0))


def test_holm_is_over_the_properties_of_a_measure():
    rising = {(name, measure): certain(1, 2, 3, 4) for name in ("a", "b") for measure in ("selectivity", "accuracy")}
    table = pick_correlations(picks([[0.1, 0.2, 0.3, 0.4]]), rising)
    assert (table["p_holm"] == 2 * table["p"]).all()


def test_picks_that_are_even_have_no_correlation():
    row = pick_correlations(picks([[0.5, 0.5]]), {("a", "selectivity"): certain(1, 2)}).iloc[0]
    assert np.isnan(row["rho"])
    assert np.isnan(row["p"])


def test_the_picks_of_a_run_are_its_traces(bert, finished_run):
    run = finished_run(MOLEX).folder.path
    found = picks_of([run], load_backbone(bert).model)
    trace = pd.read_parquet(run / "trace.parquet")
    for at, depth in enumerate(found.depths):
        for layer in range(2):
            share = trace[(trace["layer"] == depth) & (trace["expert"] == layer)]["share"].sum()
            assert found.shares[0, at, layer] == pytest.approx(share)
    assert found.shares.sum(axis=2) == pytest.approx(1.0)
    assert found.allowed.all()
    assert found.model == bert


def test_runs_of_other_seeds_are_taken_together_and_of_other_settings_refused(bert, finished_run, tmp_path):
    model = load_backbone(bert).model
    first, second = finished_run(MOLEX).folder.path, tmp_path / "second"
    shutil.copytree(first, second)
    settings = (second / "run.yaml").read_text()
    assert "\nseed: 0\n" in settings
    (second / "run.yaml").write_text(settings.replace("\nseed: 0\n", "\nseed: 1\n"))
    (second / "digests.json").unlink()  # it would say that the files are not as the run wrote them
    trace = pd.read_parquet(first / "trace.parquet")
    trace.assign(share=1 - trace["share"]).to_parquet(second / "trace.parquet")  # of two blocks, the other one
    together = picks_of([first, second], model)
    alone = [picks_of([run], model) for run in (first, second)]
    assert together.shares.tolist() == [one.shares[0].tolist() for one in alone]
    shares = [one.trace["share"].to_numpy() for one in alone]
    assert together.trace["share"].tolist() == pytest.approx(np.mean(shares, axis=0).tolist())
    assert together.called.startswith("2 runs like ")
    with pytest.raises(LamellaError, match=r"differ in more than their seed.*one at a time"):
        picks_of([first, finished_run(MOLEX | {"r": 4}).folder.path], model)


def test_what_has_no_picks_is_refused(bert, finished_run, tmp_path):
    model = load_backbone(bert).model
    with pytest.raises(LamellaError, match=r"is a run of mola, and only MoLEx.*method=molex"):
        picks_of([finished_run(MOLA).folder.path], model)
    with pytest.raises(LamellaError, match="holds no run"):
        picks_of([tmp_path], model)
    with pytest.raises(LamellaError, match=r"picks among blocks of a second model too"):
        picks_of([finished_run(MOLEX | {"guests_of": bert}).folder.path], model)
    with pytest.raises(LamellaError, match=r"policy='random', so that no router picks.*policy=learned"):
        picks_of([finished_run(MOLEX | {"policy": "random"}).folder.path], model)
    run = finished_run(MOLEX).folder.path
    shutil.copy(run / "run.yaml", tmp_path)
    with pytest.raises(LamellaError, match="not finished"):
        picks_of([tmp_path], model)
    deeper = BertModel(BertConfig(vocab_size=17, hidden_size=32, num_hidden_layers=3, num_attention_heads=2))
    with pytest.raises(
        LamellaError, match=r"picks among 2 blocks, and the model that is probed has 3.*Probe the run's"
    ):
        picks_of([run], deeper)
