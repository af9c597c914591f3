import pandas as pd
import pytest
import torch
from tests.lab.tiny_runs import MOLEX

from lamella import LamellaError, record_routing
from lamella.lab.runs.trained import load_trained
from lamella.lab.studies.choices import block_choices, choice_tables


@pytest.fixture(scope="module")
def learned(finished_run):
    return finished_run(MOLEX).folder.path


@pytest.fixture(scope="module")
def random(finished_run):
    return finished_run(MOLEX | {"policy": "random"}).folder.path


def test_choices_are_those_of_each_text_alone(random):
    found = block_choices(random)

    trained = load_trained(random)
    rows, encoded = trained.rows("test")
    for row in range(len(rows)):
        with record_routing(trained.model, per_token=True) as trace, torch.no_grad():
            trained.model(**encoded.collator([rows[row]]))
        alone = trace.tokens.set_index("layer")["expert"].to_dict()
        assert found.decisions[found.decisions["row"] == row].set_index("layer")["chosen"].to_dict() == alone
    assert found.decisions["chosen"].nunique() > 1
    assert found.lengths.tolist() == rows["length"]


def test_tables_say_what_was_chosen_for_whom(learned, random):
    tables = choice_tables({"MoLEx": block_choices(learned), "random": block_choices(random)}, "random")

    correlations, distances, *maps = tables.values()
    assert set(correlations["method"]) == {"MoLEx", "random"}
    assert set(correlations["measure"]) == {"length", "rarity", "readability", "depth"}
    assert {"all", "short texts"} <= set(distances["group"])
    assert (distances["distance"].between(0, 1)).all()
    assert len(maps) == 2
    for table in maps:
        shares = table.drop(columns=["method", "group", "layer"])
        assert shares.sum(axis=1).tolist() == pytest.approx([1.0] * len(table))
    assert all(isinstance(table, pd.DataFrame) and table.columns[0] == "method" for table in tables.values())


def test_token_decisions_have_no_text(finished_run):
    run = finished_run(MOLEX | {"granularity": "token"}).folder.path

    with pytest.raises(LamellaError, match="does not choose a block for each sequence"):
        block_choices(run)
