import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from examples.linear_molex import CLASSES, LinearMolex, counterexamples, radii, random_case, study, tally


def test_the_unrolled_ensemble_is_the_network():
    for seed in range(20):
        molex, x, _ = random_case(seed)
        weights, maps = molex.unrolled()

        assert len(weights) == 2 ** len(molex.layers)
        assert weights.sum() == pytest.approx(1.0, rel=1e-12)
        np.testing.assert_allclose(np.einsum("c,ckd,d->k", weights, maps, x), molex.logits(x), rtol=1e-11)


def test_each_member_is_a_plain_linear_network():
    molex, x, _ = random_case(3, depths=3)
    weights, maps = molex.unrolled()
    for at, choice in enumerate(itertools.product((False, True), repeat=3)):
        chosen = [molex.guests[t] if guest else t for t, guest in enumerate(choice)]
        alone = LinearMolex(molex.layers[chosen], np.arange(3), 1.0, molex.head)
        np.testing.assert_allclose(maps[at] @ x, alone.logits(x), rtol=1e-11)
        assert weights[at] == pytest.approx(np.prod([1 - molex.alpha if g else molex.alpha for g in choice]))


def test_the_bounds_never_fail_and_their_condition_is_met_sometimes_and_sometimes_not():
    counts = study(200)

    claims = [name for name in counts if name.endswith("(1)") or name.endswith("holds (2)")]
    assert len(claims) == 3
    for name in (*claims, "r is not what (2) says", "the unrolled ensemble is another function"):
        assert counts[name] == 0
    assert counts["the class does not fall at the radius"] == 0
    held = counts["cov(|d_c|, r_c) >= 0, the condition of (2)"]
    assert 0 < held < counts[CLASSES]
    assert counts["r < E[r_c] where it does not"] > 0
    assert 0 < counts["r < radius of the network without guests"] < counts[CLASSES]


def test_the_claim_without_its_conditions_has_counterexamples():
    below_mean, below_base = counterexamples()

    assert below_mean.covariance[0] < 0
    assert below_mean.ensemble[0] == pytest.approx(1 / np.sqrt(26))
    assert below_mean.length_weighted[0] <= below_mean.ensemble[0] < below_mean.mean[0]
    assert below_base.ensemble[0] == pytest.approx(2 / np.sqrt(5))
    assert below_base.mean[0] < below_base.ensemble[0] < below_base.members[0, 0] == 1.0


def test_a_wrong_bound_would_be_counted(monkeypatch):
    monkeypatch.setattr("examples.linear_molex.holds", lambda smaller, larger: smaller <= larger * 0.5)
    assert sum(tally(seed)["r < E[|d_c| r_c] / E[|d_c|] (1)"] for seed in range(5)) > 0


def test_parallel_members_gain_nothing():
    maps = np.array([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 6.0], [0.0, 0.0]]])
    actual = radii(np.array([0.3, 0.7]), maps, np.array([1.0, 0.0]), 0)
    np.testing.assert_allclose(actual.ensemble, actual.length_weighted)


def test_it_runs_as_a_script():
    script = Path(__file__).parents[2] / "examples" / "linear_molex.py"
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=120).stdout
    assert "random networks" in out
    assert "Counterexamples" in out
