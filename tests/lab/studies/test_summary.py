import dataclasses

import numpy as np
import pandas as pd
import pytest

from lamella.lab.studies.results import Results
from lamella.lab.studies.summary import question, summary

ROWS = 1000


def table(scores, *, reference="LoRA", validation=None, sizes=None, title="trec", greater=True, rows=ROWS):
    """Methods by name, with the share of test rows that each answers, by seed; those rows are drawn apart."""
    drawn = np.random.default_rng(0)
    single = {
        name: {seed: (drawn.random(rows) < share).astype(float) for seed, share in enumerate(shares)}
        for name, shares in scores.items()
    }
    values = {name: {seed: float(one.mean()) for seed, one in own.items()} for name, own in single.items()}
    trained = pd.DataFrame([{"method": name, "trainable_parameters": (sizes or {}).get(name, 100)} for name in scores])
    return Results(
        "minilm", title, title, False, "accuracy", greater, list(scores), [0, 1, 2], reference, values,
        {name: {0: (validation or {}).get(name, 0.5)} for name in scores}, single, {}, {}, trained,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "mola", "begins"),
    [
        (0.5, 0.7, "On trec with minilm MoLA is better than LoRA: MoLA accuracy 0."),
        (0.7, 0.5, "On trec with minilm MoLA does not earn its cost: MoLA accuracy 0."),
        (0.7, 0.7, "On trec with minilm it is undecided whether MoLA is better than LoRA: MoLA accuracy 0."),
    ],
)
def test_the_first_line_is_the_verdict(lora, mola, begins):
    said = summary([table({"LoRA": [lora] * 3, "MoLA": [mola] * 3})], ["LoRA", "MoLA"], {"MoLA"}).splitlines()
    assert said[0].startswith(begins)
    assert " of the same size (difference " in said[0]
    assert "95 % interval" in said[0]
    assert len(said) == 2


def test_a_gain_that_could_not_matter_is_no_gain():
    same = table({"LoRA": [1.0] * 3, "MoLA": [1.0] * 3})
    assert "MoLA does not earn its cost" in summary([same], ["LoRA", "MoLA"], {"MoLA"})


def test_undecided_says_what_would_decide():
    few = summary([table({"LoRA": [0.7] * 3, "MoLA": [0.7] * 3}, rows=100)], ["LoRA", "MoLA"], {"MoLA"})
    more = summary([table({"LoRA": [0.7] * 3, "MoLA": [0.7] * 3}, rows=4000)], ["LoRA", "MoLA"], {"MoLA"})
    seeds = [int(said.partition("some ")[2].split()[0]) for said in (few, more)]
    assert seeds[0] > 5 * seeds[1] > 0


def test_what_learned_less_than_a_linear_model_is_said_before_any_verdict():
    low = dataclasses.replace(table({"LoRA": [0.5] * 3, "MoLA": [0.7] * 3}), floors={"linear": {"test": 0.9}})
    said = summary([low], ["LoRA", "MoLA"], {"MoLA"})
    controlled = dataclasses.replace(
        table({"LoRA": [0.5] * 3, "MoLA": [0.7] * 3, "joint LoRA": [0.95] * 3}), floors={"linear": {"test": 0.9}}
    )
    assert summary([controlled], ["LoRA", "MoLA"], {"MoLA"}).startswith(
        "Of what is compared nothing reaches the linear floor of 0.900 on trec with minilm; joint LoRA does, accuracy"
    )
    assert said.startswith("No method reaches the linear floor of 0.900 on trec with minilm: ")
    assert "MoLA is better than LoRA" in said.splitlines()[0]
    assert "Train longer, as with run.epochs=" in said
    reached = dataclasses.replace(low, floors={"linear": {"test": 0.6}})
    assert summary([reached], ["LoRA", "MoLA"], {"MoLA"}).startswith("On trec")


def test_a_lower_loss_is_better():
    losses = table({"LoRA": [0.7] * 3, "MoLA": [0.5] * 3}, greater=False)
    assert "MoLA is better than LoRA" in summary([losses], ["LoRA", "MoLA"], {"MoLA"})


def test_validation_chooses_which_mixture_is_asked_about():
    both = table({"LoRA": [0.7] * 3, "MoLA": [0.9] * 3, "MoLEx": [0.5] * 3}, validation={"MoLA": 0.6, "MoLEx": 0.8})
    assert question(both, ["LoRA", "MoLA", "MoLEx"], {"MoLA", "MoLEx"}) == ("MoLEx", "LoRA")


def test_a_mixture_that_is_the_reference_has_to_beat_the_best_of_the_others():
    scores = {"MOLE": [0.7] * 3, "MOLE without balance": [0.9] * 3, "uniform": [0.6] * 3, "joint LoRA": [0.95] * 3}
    composed = table(scores, reference="MOLE", validation={"uniform": 0.4, "best LoRA": 0.3})
    listed, mixtures = ["MOLE", "MOLE without balance", "uniform"], {"MOLE", "MOLE without balance"}
    assert question(composed, listed, mixtures) == ("MOLE", "uniform")


def test_other_tables_say_how_the_same_pair_does_there():
    tables = [
        table({"LoRA": [0.5] * 3, "MoLA": [0.7] * 3}),
        table({"LoRA": [0.5] * 3, "MoLA": [0.7] * 3}, title="books"),
        table({"LoRA": [0.7] * 3, "MoLA": [0.5] * 3}, title="films"),
    ]
    said = summary(tables, ["LoRA", "MoLA"], {"MoLA"}).splitlines()
    assert said[2] == "Elsewhere MoLA against LoRA is better on books; worse on films."


def test_many_methods_are_counted_not_listed():
    scores = {"LoRA": [0.2] * 3} | {f"arm {at}": [0.9] * 3 for at in range(40)}
    said = summary([table(scores)], list(scores), {"arm 0"})
    assert said.splitlines()[1].endswith("Against LoRA: better arm 0, arm 1, arm 2, arm 3, arm 4, arm 5 and 34 more.")


def test_size_is_only_called_the_same_where_it_is():
    wide = table({"LoRA": [0.5] * 3, "MoLA": [0.7] * 3}, sizes={"MoLA": 200})
    assert "same size" not in summary([wide], ["LoRA", "MoLA"], {"MoLA"})


def test_one_method_alone_is_not_judged():
    assert summary([table({"LoRA": [0.5] * 3})], ["LoRA"], set()).startswith("On trec with minilm only LoRA was run: ")
