import pytest
from studies.claims import CLAIMS, Claim, Compared, Finding, Kept, claims_table
from studies.keep import keep, load_study, study_names, study_recipe
from tests.studies.left_studies import leave_study, write_recipe
from tests.studies.test_keep import packaged  # noqa: F401

from studies import claims


@pytest.fixture
def verdict(packaged, tmp_path, monkeypatch):  # noqa: F811
    """The cells of the only row: what was found, and the verdict; LoRA and 'wide' score alike, 'tall' scores more."""
    leave_study(tmp_path / "study", write_recipe(packaged), {"LoRA": 0.6, "wide": 0.6, "tall": 0.9})
    keep(tmp_path / "study", tmp_path / "kept")
    kept = Kept({"study": load_study("study", tmp_path / "kept")}, {}, {})

    def of(claim):
        monkeypatch.setattr(claims, "CLAIMS", (claim,))
        return claims_table(kept).splitlines()[-1].strip("| ").split(" | ")[3:]

    return of


def compared(*pairs, **more):
    return Claim("MoLA", "better", "table 1", [Compared("study", *pair, **more) for pair in pairs])


def test_a_verdict_follows_from_the_difference(verdict):
    found, said = verdict(compared(("tall", "LoRA")))
    assert found.startswith("[study](evidence/study.md) +0.300 [")
    assert said == "holds here"
    assert verdict(compared(("LoRA", "tall")))[1] == "does not hold here"


def test_two_that_learned_nothing_decide_nothing(verdict, monkeypatch):
    monkeypatch.setattr(claims, "learned_nothing", lambda table, name: sorted(table.values[name]))
    assert verdict(compared(("tall", "LoRA")))[1] == "undecided: neither learned more than the commonest label"
    monkeypatch.setattr(claims, "learned_nothing", lambda table, name: [0])  # one seed of three
    assert verdict(compared(("tall", "LoRA")))[1] == "holds here"


def test_what_cannot_be_told_says_what_could(verdict):
    found, said = verdict(compared(("wide", "LoRA")))
    assert said == "undecided: under 0.000 could not have been told"  # the two answer alike, row by row
    assert found.endswith("+0.000 [+0.000, +0.000]")


def test_places_that_differ_are_named(verdict):
    both = [Compared("study", "tall", "LoRA", called="here"), Compared("study", "LoRA", "tall", "trec")]
    found, said = verdict(Claim("MoLA", "better", "table 1", both))
    assert found.startswith("[here](evidence/study.md) +0.300 [")
    assert said == "here: holds here; trec: does not hold here"


def test_what_correction_takes_back_is_told(verdict, monkeypatch):
    monkeypatch.setattr(claims, "holm", lambda values: [0.2] * len(values))
    assert verdict(compared(("tall", "LoRA")))[1] == "undecided: p 0.200 after correction"


@pytest.mark.parametrize(
    "claim", [compared(("tall", "gone")), compared(("tall", "LoRA"), table="other"), Claim("a", "b", "c")]
)
def test_what_was_not_run_says_so(verdict, claim):
    assert verdict(claim)[-1] == "*not run*"


def test_a_claim_out_of_reach_says_why(verdict):
    assert verdict(Claim("a", "b", "c", cannot="no data"))[-1] == "cannot be tested here: no data"


def test_a_measure_of_its_own_is_shown(verdict):
    claim = Claim("a", "b", "c", [lambda kept: Finding("3 of 4", "holds here", "page")])
    assert verdict(claim) == ["[page](evidence/page.md) 3 of 4", "holds here"]


def test_a_lower_loss_speaks_for_a_claim():
    kept = Kept({"mole-prose": load_study("mole-prose")}, {}, {})
    row = next(line for line in claims_table(kept).splitlines() if "better than the LoRAs' mean" in line)
    assert "[mole-prose](evidence/mole-prose.md) +0.104 [+0.077, +0.133]" in row


def test_chance_is_shared_among_all_claims(packaged, tmp_path, monkeypatch):  # noqa: F811
    leave_study(tmp_path / "study", write_recipe(packaged), {"LoRA": 0.6, "wide": 0.62})
    keep(tmp_path / "study", tmp_path / "kept")
    kept = Kept({"study": load_study("study", tmp_path / "kept")}, {}, {})
    raw = kept.studies["study"].results[0].contrasts([("wide", "LoRA")])[0].p_value
    asked = []
    monkeypatch.setattr(claims, "holm", lambda values: asked.extend(values) or list(values))
    monkeypatch.setattr(claims, "CLAIMS", (compared(("wide", "LoRA")),) * 3)
    claims_table(kept)
    assert asked == [raw] * 3


def test_claims_name_what_the_recipes_plan():
    assert len(CLAIMS) <= 40
    for by in (by for claim in CLAIMS for by in claim.by if isinstance(by, Compared)):
        assert by.study in study_names()
        recipe = study_recipe(by.study)
        assert {by.better, by.worse} <= set(recipe.names), by
        assert by.table in ("", *(table.title for table in recipe.tables)), by
