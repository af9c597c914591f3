import gzip
import json

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from lamella.errors import LamellaError
from lamella.lab.data import KNOWN_TASKS, load_task
from lamella.lab.data.entry import FOLDER, read_entry


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A function that lays a task's files into an empty mirror folder."""
    monkeypatch.setenv("LAMELLA_DATA", str(tmp_path))

    def lay(folder, **files):
        (tmp_path / folder).mkdir()
        for name, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        source = "- repository: example.org/x\n- commit: abc\n- license: CC0\n"
        (tmp_path / folder / "SOURCE.md").write_text(source)

    return lay


@pytest.fixture
def hub(monkeypatch):
    """A function that makes `datasets.load_dataset` answer with these splits, and records what was asked."""
    monkeypatch.delenv("LAMELLA_DATA", raising=False)
    asked = []

    def answer(**splits):
        def load_dataset(*place):
            asked.append(place)
            return DatasetDict(splits)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return answer


def sentences(prefix, count=20):
    return [{"text": f"{prefix} {number}", "label": number % 2} for number in range(count)]


def sizes(task):
    return {name: len(split) for name, split in task.splits.items()}


def test_sst2_from_the_mirror(mirror):
    mirror("sst2", train=[*sentences("t"), {"text": "d 0", "label": 1}], dev=sentences("d", 6))
    task = load_task("sst2")
    assert (task.kind, task.metric, task.label_names) == ("classification", "accuracy", ("negative", "positive"))
    assert sizes(task) == {"train": 18, "validation": 2, "test": 6}
    assert task.source.startswith("example.org/x at commit abc (train.jsonl.gz sha256 ")
    assert task.licence == "CC0"
    assert "1 train rows dropped because they also occur in an evaluation split" in task.notes


def test_cola_joins_its_development_files(mirror):
    mirror("cola", train=sentences("t"), dev_in_domain=sentences("i", 3), dev_out_of_domain=sentences("o", 4))
    task = load_task("cola")
    assert (task.metric, len(task.splits["test"])) == ("matthews", 7)


def test_blitzer_by_domain(mirror):
    rows = [{**row, "domain": ("books", "dvd")[number // 10]} for number, row in enumerate(sentences("t"))]
    mirror("blitzer_domains", train=rows, dev=[{**row, "text": f"d{row['text']}"} for row in rows])
    assert len(load_task("blitzer/dvd").splits["test"]) == 10
    assert len(load_task("blitzer").splits["test"]) == 20
    with pytest.raises(LamellaError, match=r"blitzer has no domain 'book'. Choose one: blitzer/books, blitzer/dvd"):
        load_task("blitzer/book")


def test_bbh_is_few_shot_and_needs_a_task(mirror):
    mirror("bbh", test=[{"task": "navigate", "input": f"q {number}", "target": "Yes"} for number in range(12)])
    task = load_task("bbh/navigate")
    assert (task.kind, task.metric, sizes(task)) == ("seq2seq", "exact_match", {"train": 5, "test": 7})
    with pytest.raises(LamellaError, match=r"bbh is 1 tasks. Choose one: bbh/navigate"):
        load_task("bbh")


def test_bbh_split_leaves_most_rows_to_learn_from(mirror):
    mirror("bbh", test=[{"task": "navigate", "input": f"q {number}", "target": "Yes"} for number in range(250)])
    task, few = load_task("bbh-split/navigate"), load_task("bbh-split/navigate@5")
    assert (task.kind, sizes(task)) == ("seq2seq", {"train": 140, "validation": 10, "test": 100})
    assert sizes(few) == {"train": 5, "validation": 10, "test": 100}
    assert set(task.splits["test"]["source"]) < set(load_task("bbh/navigate").splits["test"]["source"])


def test_scienceqa_puts_the_hint_first(mirror):
    rows = {split: [{"question": f"{split}?", "hint": " h ", "choices": ["a", "b"], "label": 1}] for split in "abc"}
    mirror("scienceqa_mola", train=rows["a"], validation=rows["b"], test=rows["c"])
    assert load_task("scienceqa").splits["train"][0] == {"question": "h\na?", "choices": ["a", "b"], "label": 1}


def test_wikitext_lines_become_articles(mirror):
    lines = ["= One =", "text", "= = Part = =", "more", "= Two =", "end"]
    mirror("wikitext2", valid=[{"text": line} for line in lines], test=[{"text": " = Three = "}, {"text": ""}])
    task = load_task("wikitext2")
    assert {text for split in ("train", "validation") for text in task.splits[split]["text"]} == {
        "= One =\ntext\n= = Part = =\nmore",
        "= Two =\nend",
    }
    assert task.splits["test"]["text"] == ["= Three ="]
    assert task.notes[0] == "the mirror has no train file: the published valid rows are trained on"


def test_e2e_keeps_the_references_of_a_source_together(mirror):
    rows = [{"mr": f"m{number // 4}", "ref": f"r{number}"} for number in range(40)]
    mirror("e2e_nlg", dev=rows, test=[{"mr": "x", "ref": "a"}, {"mr": "x", "ref": "b"}])
    task = load_task("e2e")
    assert sizes(task) == {"train": 36, "validation": 4, "test": 2}
    assert not set(task.splits["train"]["source"]) & set(task.splits["validation"]["source"])


def test_a_mirror_folder_as_it_stands(mirror):
    names = ("DESC", "ENTY")
    rows = [{**row, "label_name": names[row["label"]]} for row in sentences("t")]
    mirror("trec", train=rows, test=sentences("x", 3))
    task = load_task("mirror:trec")
    assert (task.label_names, task.licence, len(task.splits["test"])) == (names, "CC0", 3)
    with pytest.raises(
        LamellaError, match=r"mirror:nope names a folder of the local mirror, but .* has no folder nope"
    ):
        load_task("mirror:nope")


def test_the_mirror_must_be_set_and_a_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LAMELLA_DATA", raising=False)
    with pytest.raises(LamellaError, match="LAMELLA_DATA is not set"):
        load_task("mirror:trec")
    with pytest.raises(LamellaError, match=r"e2e has no copy on the hub .* LAMELLA_DATA .* e2e_nlg"):
        load_task("e2e")
    monkeypatch.setenv("LAMELLA_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(LamellaError, match="nowhere', which is not a folder"):
        load_task("sst2")


def glue(rows):
    return Dataset.from_list([{"sentence": row["text"], "label": row["label"], "idx": 0} for row in rows])


@pytest.mark.parametrize("name", ["sst2", "hub:glue/sst2", "hub:nyu-mll/glue/sst2"])
def test_sst2_from_the_hub(hub, name):
    asked = hub(train=glue(sentences("t")), validation=glue(sentences("d", 4)), test=glue([{"text": "?", "label": -1}]))
    task = load_task(name)
    assert asked == [("nyu-mll/glue", "sst2")]
    assert sizes(task) == {"train": 18, "validation": 2, "test": 4}
    assert task.source == "nyu-mll/glue (sst2) on the Hugging Face hub"


def test_openbookqa_from_the_hub(hub):
    row = {"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    hub(**{split: Dataset.from_list([{**row, "question_stem": split}]) for split in ("train", "validation", "test")})
    assert load_task("openbookqa").splits["test"][0] == {"question": "test", "choices": ["a", "b"], "label": 1}


def test_any_hub_dataset_with_our_columns(hub):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    unlabelled = Dataset.from_list([{"text": "?", "label": -1}])
    hub(
        train=Dataset.from_list(sentences("t"), features=features),
        validation=Dataset.from_list(sentences("d", 4), features=features),
        test=unlabelled,
    )
    task = load_task("hub:someone/spam")
    assert task.label_names == ("ham", "spam")
    assert len(task.splits["test"]) == 4
    assert "the test split has no labels and is left out" in task.notes


def test_a_hub_dataset_with_other_columns_or_splits(hub):
    hub(train=Dataset.from_list([{"body": "a"}]), test=Dataset.from_list([{"body": "b"}]))
    with pytest.raises(LamellaError, match="someone/x, train split has the columns body, which fit no task"):
        load_task("hub:someone/x")
    hub(train=Dataset.from_list([{"text": "a"}]))
    with pytest.raises(LamellaError, match="someone/x has the splits train; a train split and"):
        load_task("hub:someone/x")


def test_a_hub_out_of_reach_names_the_way_out(monkeypatch):
    def unreachable(*_):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.delenv("LAMELLA_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(LamellaError, match=r"Couldn't reach .* network.* LAMELLA_DATA .* file:PATH"):
        load_task("rte")


@pytest.mark.parametrize("name", ["trecc", "", "file:", "hub:", "nope:x"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(LamellaError, match="There is no task ") as caught:
        load_task(name)
    assert all(known in str(caught.value) for known in KNOWN_TASKS)
    assert name != "trecc" or "Did you mean trec" in str(caught.value)


def test_a_task_without_subsets(mirror):
    mirror("sst2", train=sentences("t"), dev=sentences("d", 4))
    with pytest.raises(LamellaError, match="sst2 has no subsets"):
        load_task("sst2/books")


def test_every_public_task_says_where_it_lies_and_its_terms():
    for path in FOLDER.glob("*.yaml"):
        entry = read_entry(path)
        assert entry.kind
        assert entry.about if entry.asset else entry.licence
        assert entry.hub is None or entry.hub.splits


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            "sst2",
            [{"words": "a"}],
            "train.jsonl.gz has the columns words, which do not make a",
        ),
        ("sst2", [{"text": "a", "label": 2}], "row 1, column 'label': 2 is none of 0 to 1"),
        ("sst2", [{"text": "a", "label": 1}, {"text": None, "label": 1}], "row 2, column 'text': missing or null"),
        ("sst2", [{"text": "a", "label": "x"}], "row 1, column 'label': 'x' mixes with labels like 0"),
    ],
)
def test_a_broken_mirror_is_named(mirror, task, rows, message):
    mirror(task, train=rows, dev=rows)
    with pytest.raises(LamellaError, match=message):
        load_task(task)


def test_a_mirror_row_without_its_columns(mirror):
    rows = [{"question": "q"}]
    mirror("scienceqa_mola", train=rows, validation=rows, test=rows)
    with pytest.raises(LamellaError, match=r"scienceqa, from example.org/x .*: a row has no column 'hint'"):
        load_task("scienceqa")
