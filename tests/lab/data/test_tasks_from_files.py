import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from lamella.errors import LamellaError
from lamella.lab.data import load_task

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode())) if path.suffix == ".gz" else path.write_text(text)
    return f"file:{path}"


def numbered(row, count=20):
    """The row `count` times, made different in its first text."""
    column = next(name for name, value in row.items() if isinstance(value, str))
    return [{**row, column: f"{row[column]} {number}"} for number in range(count)]


@pytest.mark.parametrize(
    ("row", "kind", "metric"),
    [
        ({"source": "a", "target": "b"}, "seq2seq", "rougeL"),
        ({"text": "a"}, "causal-lm", "perplexity"),
        ({"prompt": "a", "completion": "b"}, "causal-lm", "perplexity"),
        ({"question": "a", "choices": ["b", "c"], "label": 1}, "multiple-choice", "accuracy"),
        ({"text1": "a", "text2": "b", "label": 0.5}, "regression", "pearson"),
        ({"text1": "a", "label": 2}, "regression", "pearson"),
        ({"text": "a", "label": 0.5}, "regression", "pearson"),
    ],
)
def test_the_kind_follows_from_the_columns(tmp_path, row, kind, metric):
    task = load_task(write(tmp_path / "rows.jsonl", numbered(row)))
    assert (task.kind, task.metric) == (kind, metric)
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 14, "validation": 2, "test": 4}
    assert task.notes[0].startswith(f"read as {kind}, from the columns ")
    assert "rows.jsonl sha256 " in task.source
    assert str(tmp_path) not in task.source


def test_chat_rows(tmp_path):
    rows = [{"messages": [{"role": "user", "content": str(number)}, CHAT[1]]} for number in range(10)]
    task = load_task(write(tmp_path / "rows.jsonl.gz", rows))
    assert task.kind == "causal-lm"
    assert task.splits["train"][0]["messages"][1] == CHAT[1]


def test_text_labels_are_numbered_in_sorted_order(tmp_path):
    rows = [{"text": f"t{number}", "label": ("yes", "no")[number % 2]} for number in range(20)]
    task = load_task(write(tmp_path / "rows.jsonl", rows))
    assert task.label_names == ("no", "yes")
    assert task.splits["train"].column_names == ["text", "label"]
    assert all(row["label"] == (int(row["text"][1:]) + 1) % 2 for split in task.splits.values() for row in split)


def test_label_names_are_kept(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 2, "label_name": ("bad", "good")[n % 2]} for n in range(20)]
    assert load_task(write(tmp_path / "rows.jsonl", rows)).label_names == ("bad", "good")


def test_csv_and_parquet_hold_the_same_task(tmp_path):
    rows = [{"text1": f"a, {n}", "text2": "line\nbreak", "label": n % 3} for n in range(30)]
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text1", "text2", "label"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    from_csv, from_parquet = (load_task(f"file:{tmp_path}/rows.{end}") for end in ("csv", "parquet"))
    assert from_csv.kind == from_parquet.kind == "pair-classification"
    assert from_csv.label_names == ("0", "1", "2")
    assert from_csv.splits["train"].to_list() == from_parquet.splits["train"].to_list()


def test_a_folder_with_a_file_a_split(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": f"t{n}", "label": n % 2} for n in range(10)])
    write(tmp_path / "dev.jsonl.gz", [{"text": "t0", "label": 0}, {"text": "v", "label": 1}])
    write(tmp_path / "test.jsonl", [{"text": "x", "label": 1}])
    (tmp_path / "SOURCE.md").write_text("# rows\n- repository: example.org/rows\n- license: CC0\n")
    task = load_task(f"file:{tmp_path}")
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 9, "validation": 2, "test": 1}
    assert "1 train rows dropped because they also occur in an evaluation split" in task.notes
    assert task.licence == "CC0"
    assert task.source.startswith("example.org/rows (train.jsonl sha256 ")


GOOD = [{"text": f"t{n}", "label": n % 2} for n in range(10)]
PAIR = {"text1": "a", "text2": "b"}
QUESTION = {"question": "q", "choices": ["a", "b"], "label": 0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"words": "a"}], "rows.jsonl has the columns words, which fit no task. Rename them"),
        ([PAIR], "rows.jsonl has the columns text1, text2 but no 'label' column"),
        ([*GOOD, {"text": None, "label": 0}], "rows.jsonl, row 11, column 'text': missing or null"),
        ([*GOOD, {"label": 0}], "rows.jsonl, row 11, column 'text': missing or null"),
        ([{"label": 0}, *GOOD], "rows.jsonl, row 1, column 'text': missing or null"),
        ([*GOOD, {"text": " ", "label": 0}], "rows.jsonl, row 11, column 'text': empty"),
        ([*GOOD, {"text": 5, "label": 0}], "rows.jsonl, row 11, column 'text': 5 is not text"),
        ([*GOOD, {"text": "a"}], "rows.jsonl, row 11, column 'label': missing, null or empty"),
        ([*GOOD, {"text": "a", "label": "yes"}], "row 11, column 'label': 'yes' mixes with labels like 0"),
        ([*GOOD, {"text": "a", "label": True}], "row 11, column 'label': True is neither a number nor text"),
        ([*GOOD, {"text": "a", "label": float("nan")}], "row 11, column 'label': nan is not a finite number"),
        ([{"text": f"t{n}", "label": 1} for n in range(5)], "rows.jsonl: every row has the label 1"),
        ([{**GOOD[0], "label_name": "x"}, {**GOOD[2], "label_name": "y"}], "label 0 is called 'y' here and 'x' before"),
        ([QUESTION, {**QUESTION, "label": 2}], "row 2, column 'label': 2 is not the index of one of the 2 choices"),
        ([QUESTION, {**QUESTION, "choices": ["a"]}], "row 2, column 'choices': needs a list of at least two texts"),
        ([*GOOD, {"text": "a\ud83d", "label": 0}], "row 11, column 'text': letter 2 is half of a surrogate pair"),
        ([{"messages": [{"role": "assistant", "content": "\udc80"}]}], "row 1, column 'messages': letter 10 is half"),
        ([{**row, "label": float(row["label"])} for row in GOOD], "whole numbers, written with a point (0.0, 1.0)"),
        ([*GOOD, {"text": "a", "label": 1.0}], "whole numbers, written with a point (1.0)"),
        ([*GOOD, {"text": "a", "label": 0.5}, {"text": "b", "label": 10**400}], "row 12, column 'label': 1000"),
        ([{**row, "label": -1} for row in GOOD], "rows.jsonl: every row has the label -1, which stands for none"),
        ([{"text": f"t{n}", "Labels": n % 2} for n in range(10)], "column 'Labels', which is read if it is called"),
        ([{"text": f"t{n}", "label": f"{n},5"} for n in range(20)], "20 rows have 20 labels, such as '0,5' and '1,5'"),
        ([{"messages": CHAT[:1]}], "row 1, column 'messages': no assistant turn"),
        ([{"messages": [{"role": "user"}]}], "row 1, column 'messages': needs a list of"),
        (GOOD[:2], "rows.jsonl has too few different rows"),
        ([GOOD[0]] * 10 + [GOOD[1]], "rows.jsonl has too few different rows"),
        ([], "rows.jsonl has no rows"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, message):
    name = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(LamellaError) as caught:
        load_task(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n', "rows.jsonl, row 2 is empty"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "rows.jsonl, row 2 is not JSON"),
        ("rows.jsonl", b"[1]\n", "rows.jsonl, row 1 is a list"),
        ("rows.jsonl", b'{"text": "a"}\n\xff\xfe', "rows.jsonl, line 2 cannot be read as UTF-8"),
        ("rows.jsonl", b"[" * 100_000, "rows.jsonl, row 1 is not JSON"),
        ("rows.jsonl", b'{"text": "a", "label": ' + b"1" * 5000 + b"}", "rows.jsonl, row 1 is not JSON"),
        ("rows.txt", "one\n\ntwo".encode("utf-16"), "rows.txt, line 1 cannot be read as UTF-8"),
        ("rows.jsonl.gz", b"plain", "rows.jsonl.gz cannot be unpacked as .gz"),
        ("rows.parquet", b"plain", "rows.parquet is not a readable Parquet file"),
        ("rows.csv", b"text,label\na,0\nb\n", "rows.csv, row 2 has 1 cells, and the header has 2 columns"),
        ("rows.csv", b"text,label\na,b,0\nc,1\n", "rows.csv, row 1 has 3 cells, and the header has 2 columns"),
        ("rows.csv", b"text,label\na,\nc,1\n", "rows.csv, row 1, column 'label': missing, null or empty"),
        ("rows.csv", b"text,text,label\na,b,0\n", "rows.csv has two columns named 'text'"),
        ("rows.csv", b'text,label\n"a,0\nb,1\n', "rows.csv, line 3 cannot be read as CSV"),
        ("rows.csv", b"text,label\n\xe9,0\n", "rows.csv, line 2 cannot be read as UTF-8"),
        ("rows.csv", b"", "rows.csv has no rows"),
        ("rows.csv", b"text,label\na,0.0\nb,1.0\n", "whole numbers, written with a point (0.0, 1.0)"),
        ("rows.csv", b"text,label\na,0\nb,NaN\n", "rows.csv, row 2, column 'label': missing, null or empty"),
        ("rows.csv", b"text, label\na,0\nb,1\n", "has a column ' label', which is read if it is called 'label'"),
        ("rows.jsonl", b'{"text": "a", "label": 1, "label": 0}\n', "row 1 is not JSON ('label' is there twice)"),
        ("rows.xlsx", b"", "rows.xlsx is none of .jsonl, .jsonl.gz, .csv, .csv.gz, .parquet"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LamellaError) as caught:
        load_task(f"file:{tmp_path / name}")
    assert message in str(caught.value)


def test_labels_made_of_digits_are_names(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"t{n},{'007' if n % 2 else '7'}\n" for n in range(20)))
    assert load_task(f"file:{tmp_path}/rows.csv").label_names == ("007", "7")


def test_a_column_that_nothing_turns_on_may_be_called_as_it_likes(tmp_path):
    rows = [{**row, "Source": "web", "id": number} for number, row in enumerate(GOOD)]
    assert "columns that are not read: Source, id" in load_task(write(tmp_path / "rows.jsonl", rows)).notes


def test_a_text_longer_than_the_standard_reader_allows(tmp_path):
    long = "word " * 40_000
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f'"{n} {long}",{n % 2}\n' for n in range(10)))
    assert load_task(f"file:{tmp_path}/rows.csv").splits["train"][0]["text"].endswith(long)


def test_amounts_that_are_whole_are_said_to_be_amounts(tmp_path):
    write(tmp_path / "rows.jsonl", [{"text1": f"t{n}", "label": float(n)} for n in range(10)])
    (tmp_path / "task.yaml").write_text("kind: regression\nfiles: {all: rows.jsonl}\n")
    assert load_task(str(tmp_path / "task.yaml")).kind == "regression"


def test_a_label_that_training_lacks(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    write(tmp_path / "test.jsonl", [{"text": "x", "label": 7}])
    with pytest.raises(LamellaError, match=r"test.jsonl, row 1, column 'label': 7 is unknown: train.jsonl has 0, 1"):
        load_task(f"file:{tmp_path}")


def test_folders_that_do_not_say_what_is_what(tmp_path):
    with pytest.raises(LamellaError, match="needs a train file and a validation or test file"):
        load_task(f"file:{tmp_path}")
    for name in ("train.jsonl", "test.jsonl", "valid.jsonl", "dev.jsonl"):
        write(tmp_path / name, GOOD)
    with pytest.raises(LamellaError, match=r"has valid.jsonl and dev.jsonl for one split"):
        load_task(f"file:{tmp_path}")


def test_a_missing_file(tmp_path):
    with pytest.raises(LamellaError, match=r"There is no file .*nope.jsonl"):
        load_task(f"file:{tmp_path}/nope.jsonl")


@pytest.mark.parametrize("other", ["no ", " no", "NO"])
def test_a_label_written_in_two_ways_is_named(tmp_path, other):
    rows = [{"text": f"t{number}", "label": ("yes", "no", other)[number % 3]} for number in range(20)]
    with pytest.raises(LamellaError, match=r"labels '.*' and '.*' differ in white space or capitals alone"):
        load_task(write(tmp_path / "rows.jsonl", rows))
