import pandas as pd
import pytest

from lamella.errors import LamellaError
from lamella.lab.report.tables import frame_table, settings_sections


def test_cells_have_their_text_and_kind(results):
    table = frame_table(results, "scores", missing="not run")
    assert [head.text for head in table.columns] == list(results.columns)
    assert [head.kind for head in table.columns] == ["text"] * 3 + ["number"] * 4
    assert [cell.text for cell in table.rows[1]] == [
        "LoRA",
        "trec",
        "accuracy",
        "0.874",
        "0.870",
        "0.878",
        "0.851 to 0.897",
    ]
    assert [(cell.text, cell.kind) for cell in table.rows[3][3:]] == [("not run", "missing")] * 4


def test_flags_are_words():
    table = frame_table(pd.DataFrame({"method": ["a"], "exact": [True]}), "scores", missing="not run")
    assert table.rows[0][1].text == "yes"


@pytest.mark.parametrize("frame", [pd.DataFrame(), pd.DataFrame({"mean": [1.0], "method": ["a"]})])
def test_a_table_without_a_method_column_is_refused(frame):
    with pytest.raises(LamellaError, match="'scores' must be 'method'"):
        frame_table(frame, "scores", missing="not run")


def test_settings_become_sections_with_dotted_names():
    settings = {"method": {"r": 8, "router": {"kind": "linear"}, "empty": {}}, "task": "trec", "none": {}}
    general, method = settings_sections(settings)
    assert (general.title, general.rows) == ("general", (("task", "trec"), ("none", "empty")))
    assert method.rows == (("r", "8"), ("router.kind", "linear"), ("empty", "empty"))
    assert settings_sections({}) == ()
