"""What kept probes say, of tables that are worked out by hand."""

import json

import pandas as pd
import pytest
from studies.claims import Claim, Kept
from studies.probing import is_probing, keep_probing, kept_probing, probing_page

from lamella.errors import LamellaError
from studies import claims


@pytest.fixture
def kept(tmp_path):
    """Surface that falls, meaning that rises and is picked, and syntax of which nothing is known."""

    def left(surface=(-0.9, -1.0, -0.7), meaning=(0.9, 0.7, 1.0), p=0.01):
        folder = tmp_path / "minilm-trec"
        folder.mkdir(exist_ok=True)
        trends = {"length": surface, "shift": (0.1, -0.5, 0.6), "class": meaning}
        kinds = dict(zip(trends, ("surface", "syntactic", "semantic"), strict=True))
        rows = [(name, kinds[name], *one) for name, one in trends.items()]
        columns = ["property", "kind", "rho", "low", "high"]
        pd.DataFrame(rows, columns=columns).to_parquet(folder / "trends.parquet")
        every = [(name, kinds[name], layer, 0.1 * (layer + 1)) for name in trends for layer in (-1, 0, 1)]
        results = pd.DataFrame(every, columns=["property", "kind", "layer", "selectivity"])
        results.to_parquet(folder / "results.parquet")
        found = [(name, "selectivity", 0.8, 0.5, 1.0, -0.6, 0.6, p if name == "class" else 0.9) for name in trends]
        names = ["property", "measure", "rho", "low", "high", "random_low", "random_high", "p_holm"]
        pd.DataFrame(found, columns=names).to_parquet(folder / "correlations.parquet")
        picks = pd.DataFrame([(0, 1, 1.0), (1, 0, 0.25), (1, 1, 0.75)], columns=["depth", "layer", "share"])
        picks.to_parquet(folder / "picks.parquet")
        settings = {"model": "minilm", "text": {"task": "trec"}, "runs": {"number": 3}}
        (folder / "probe.json").write_text(json.dumps(settings))
        assert is_probing(folder)
        assert keep_probing(folder, tmp_path / "kept") == "minilm-trec"
        return kept_probing(tmp_path / "kept")

    return left


def verdict(kept, says):
    (claim,) = [one for one in claims.CLAIMS if one.says == says]
    assert isinstance(claim, Claim)
    (by,) = claim.by
    return by(Kept({}, {}, {one.name: one for one in kept}))


def test_the_page_has_each_layer_and_what_the_picks_follow(kept):
    page = probing_page(kept())
    assert "3 runs of MoLEx. Beyond what random picks do, the picks follow class." in page
    assert "| length | surface | +0.000 | +0.100 | +0.200 |" in page
    assert "| class | +0.900 [+0.700, +1.000] | +0.800 [+0.500, +1.000] | -0.600 to +0.600 | 0.010 |" in page
    assert "| 1 | 0.250 | 0.750 |" in page
    assert "the picks follow no property." in probing_page(kept(p=0.06))
    assert probing_page([]) == ""


@pytest.mark.parametrize(
    ("surface", "meaning", "said"),
    [
        ((-0.9, -1.0, -0.7), (0.9, 0.7, 1.0), "holds here"),
        ((-0.9, -1.0, -0.7), (-0.9, -1.0, -0.7), "does not hold here"),
        ((0.9, 0.7, 1.0), (0.9, 0.7, 1.0), "does not hold here"),
        ((-0.9, -1.0, 0.1), (0.9, 0.7, 1.0), "undecided: intervals reach over 0"),
    ],
)
def test_surface_must_fall_and_meaning_rise(kept, surface, meaning, said):
    found = verdict(kept(surface, meaning), "early layers hold surface, later ones meaning")
    assert found.verdict == said
    assert "shift" not in found.figure


def test_picks_must_follow_meaning_more_than_random_ones(kept):
    says = "its routers pick layers for the meaning they hold"
    assert verdict(kept(), says).verdict == "holds here"
    assert verdict(kept(p=0.06), says).verdict == "undecided: no more than random picks do"
    assert verdict([], says) is None


def test_probes_without_runs_are_not_kept(tmp_path):
    (tmp_path / "probe.json").write_text("{}")
    with pytest.raises(LamellaError, match=r"has no results.parquet.*--run RUN"):
        keep_probing(tmp_path, tmp_path / "kept")
