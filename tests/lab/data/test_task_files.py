"""A user's task is one YAML file."""

import csv
import json

import pytest

from lamella.errors import LamellaError
from lamella.lab.data import load_task

ENTRY = """
kind: classification
about: notes on hotels
labels: [bad, good]
files: {train: [may.csv, june.csv], test: july.csv}
columns: {note: text, verdict: label}
keep: {language: [en]}
licence: CC0
caution: some guests write twice
"""


@pytest.fixture
def hotels(tmp_path):
    """The YAML file of a task with its rows beside it."""
    for name in ("may", "june", "july"):
        with (tmp_path / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["note", "verdict", "language"])
            verdicts = ("good", "bad") if name != "june" else ("1", "0")  # a label by its name or its number
            writer.writerows([f"{name} {n}", verdicts[n % 2], "de" if n == 9 else "en"] for n in range(10))
    (tmp_path / "hotels.yaml").write_text(ENTRY)
    return tmp_path / "hotels.yaml"


def test_a_task_of_a_user_is_one_yaml_file(hotels):
    task = load_task(str(hotels))
    assert (task.kind, task.metric, task.label_names) == ("classification", "accuracy", ("bad", "good"))
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 17, "validation": 1, "test": 9}
    assert all(row["label"] == (int(row["text"][-1]) + 1) % 2 for split in task.splits.values() for row in split)
    assert task.source.startswith("notes on hotels, from local files (may.csv sha256 ")
    assert (task.licence, task.notes[0]) == ("CC0", "some guests write twice")
    assert len(load_task(f"{hotels}@5").splits["train"]) == 5


def test_a_task_file_divides_one_file_by_groups_and_subsets(tmp_path):
    rows = [{"text": f"{n}", "author": n // 4, "topic": "ab"[n // 20]} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "posts.yaml"
    text = "kind: causal-lm\nfiles: {all: 'row*.jsonl'}\ngroup: author\nunit: author\nsubset: topic\n"
    path.write_text(text + "split: {test: 8, validation: 4}\n")
    task = load_task(str(path))
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 28, "validation": 4, "test": 8}
    authors = {name: {int(text) // 4 for text in split["text"]} for name, split in task.splits.items()}
    assert not authors["train"] & authors["test"]
    assert "split here by author" in task.notes[0]
    assert {int(text) // 20 for text in load_task(f"{path}/b").splits["train"]["text"]} == {1}
    with pytest.raises(LamellaError, match=r"has no topic 'c'. Choose one: .*posts.yaml/a"):
        load_task(f"{path}/c")
    path.write_text(text)
    assert {name: len(split) for name, split in load_task(str(path)).splits.items()} == {
        "train": 28, "validation": 4, "test": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("kind: classification", "give files or hub"),
        ("files: {all: a.csv, train: b.csv}", "files has 'all' beside other splits"),
        ("files: {test: a.csv}", "files needs train and one of validation and test, or all"),
        ("files: {train: a.csv, test: b.csv}\nsplit: {test: 2}", "split divides the files called 'all'"),
        ("files: {all: a.csv}\nsplit: {validation: 2}", "either train or test"),
        ("files: {all: a.csv}\nshape: odd", "shape 'odd' is unknown; known are trec, "),
        ("files: {all: a.csv}\ncolums: {a: b}", "hotels.yaml, colums: Extra inputs are not permitted"),
        ("files: {all: gone.csv}\nkind: causal-lm", "There is no file .*gone.csv"),
        ("files: {all: gone.log}\nformat: lines\nkind: causal-lm", "There is no file .*gone.log"),
        ("files: {all: hotels.yaml}\nformat: json\nkind: causal-lm", "hotels.yaml cannot be read as json"),
        ("asset: gone\nfiles: {all: a.csv}\nkind: causal-lm", "names the asset 'gone'; known are minilm, "),
        ("files: {all: may.csv}\nkeep: {tongue: [en]}\nkind: causal-lm", "a row has no column 'tongue'"),
        ("files: {all: may.csv}\ncolumns: {note: text}\nkind: regression", "do not make a regression task"),
        ("files: {all: may.csv}\ncolumns: {note: text}", "columns is read of a task whose kind is named"),
        ("a: [", "hotels.yaml is not valid YAML"),
    ],
)
def test_a_task_file_that_cannot_be_used_is_named(hotels, entry, message):
    hotels.write_text(entry)
    with pytest.raises(LamellaError, match=message):
        load_task(str(hotels))


def test_a_missing_task_file_is_named(tmp_path):
    with pytest.raises(LamellaError, match=r"gone.yaml cannot be read"):
        load_task(str(tmp_path / "gone.yaml"))
