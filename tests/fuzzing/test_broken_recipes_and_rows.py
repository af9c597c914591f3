"""Damaged recipes and files of rows are refused by name, or read as they stand: nothing in them is lost unseen."""

import csv
import io
import json
import random
import shutil
from collections import Counter

import pandas as pd
import pytest
import yaml
from tests.fuzzing.mutations import damage
from tests.fuzzing.oracle import Ending, judge, says_what_is_read

from lamella.lab.data import load_task
from lamella.lab.runs.settings import resolve
from lamella.lab.studies.recipe import read_study

RUN = {
    "model": "base/encoder", "task": "trec", "seed": 3, "max_steps": 12, "batch_size": 8, "lr": 0.03, "packing": False,
    "limit": {"train": 20}, "method": {"name": "mola", "r": 2, "num_experts": [2, 4], "router_aux_loss_coef": 0.01},
}  # fmt: skip
STUDY = {
    "backbones": ["base/encoder"], "tasks": ["trec"], "seeds": [0, 1], "budget": "equal-parameters", "match": "MoLA",
    "reference": "LoRA", "run": {"max_steps": 12, "lr": 0.03},
    "methods": {"MoLA": {"method": {"name": "mola", "r": 2}}, "LoRA": {"method": "lora"}},
}  # fmt: skip


def read_run(path):
    return resolve(str(path)).model_dump(mode="json")


def read_plan(path):
    study = read_study(str(path))
    study.cells()  # what the settings of each run are read for
    return study.model_dump(mode="json")


READERS = {"run": (RUN, read_run), "study": (STUDY, read_plan)}


def recipe_case(number, folder):
    """The ending of a case, and what was said where it ends otherwise."""
    pick = random.Random(f"recipe {number}")
    (folder / "beside.txt").write_text("some text\n")
    whole, read = READERS[pick.choice(sorted(READERS))]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    expected = read(path)
    how = damage(path, pick)
    ending, said = judge(lambda: read(path), expected, lambda: reads_it(path, read))
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return ending, f"{number} {how}: {said}"[:400] if ending is Ending.OTHER else None


def reads_it(path, read):
    """Another valid recipe: every key that it has is read with the value that it has, of the same kind."""
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    return says_what_is_read(in_full(given), read(path))


def in_full(given):
    """A method that is named by a word alone is short for a mapping with its name."""
    if isinstance(given, dict) and isinstance(given.get("method"), str):
        return {**given, "method": {"name": given["method"]}}
    return given


ROWS = [
    {"text": f"{'who' if i % 2 else 'where'} is number {i}", "label": ("person", "place")[i % 2]} for i in range(12)
]
PARTS = {"train": ROWS[:6], "validation": ROWS[6:9], "test": ROWS[9:]}
SUFFIXES = (".jsonl", ".csv", ".parquet")


def written(folder, suffix):
    for name, rows in PARTS.items():
        path = folder / f"{name}{suffix}"
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif suffix == ".csv":
            pd.DataFrame(rows).to_csv(path, index=False)
        else:
            pd.DataFrame(rows).to_parquet(path)


def loaded(folder):
    """The rows of each split in any order, labels by their names."""
    task = load_task(f"file:{folder}")
    names = task.label_names
    return {
        split: Counter((row["text"], names[row["label"]] if names else str(row.get("label"))) for row in rows)
        for split, rows in task.splits.items()
    }


def stands(folder):
    """The same, read without lamella: rows that are there twice count once, and those of a later split too go."""
    there = {}
    for name in PARTS:
        path = next((path for path in folder.iterdir() if path.stem == name), None)
        if path is None:
            continue
        text = None if path.suffix == ".parquet" else path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line]
        elif path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = pd.read_parquet(path).to_dict("records")
        there[name] = [(row["text"], str(row.get("label"))) for row in rows]
    return there


def as_it_stands(folder):
    """Another valid task: what was read are the rows in the files, each text with the label that stands beside it."""
    read, there = loaded(folder), stands(folder)
    rows_there = {row for rows in there.values() for row in rows}
    lost = rows_there - {row for split in read.values() for row in split}
    texts = Counter(text for part in there.values() for text, _ in set(part))
    # a split without a file is divided from another's rows, and a text in two splits stays in one
    where = there if read.keys() == there.keys() else dict.fromkeys(read, rows_there)
    known = all(set(rows) <= set(where[split]) for split, rows in read.items())
    return known and all(texts[text] > 1 for text, _ in lost)


def rows_case(number, folder):
    pick = random.Random(f"rows {number}")
    suffix = pick.choice(SUFFIXES)
    task = folder / "task"
    task.mkdir()
    written(task, suffix)
    expected = loaded(task)
    how = damage(task / f"{pick.choice(sorted(PARTS))}{suffix}", pick)
    ending, said = judge(lambda: loaded(task), expected, lambda: as_it_stands(task))
    shutil.rmtree(task)
    return ending, f"{number} {how}: {said}"[:400] if ending is Ending.OTHER else None


CASES = {"recipe": recipe_case, "rows": rows_case}


@pytest.mark.parametrize("kind", CASES)
def test_what_is_broken_is_named_or_read_as_it_stands(tmp_path, kind):
    endings = [CASES[kind](number, tmp_path) for number in range(114)]
    others = [said for _, said in endings if said]

    assert not others, "\n".join(others)
    counts = Counter(ending for ending, _ in endings)
    assert counts[Ending.NAMED] > 20
    assert counts[Ending.ANOTHER] > 3


@pytest.mark.heavy
@pytest.mark.parametrize("kind", CASES)
def test_many_are(tmp_path, kind):
    endings = [CASES[kind](number, tmp_path) for number in range(1000)]
    others = [said for _, said in endings if said]

    print(kind, {ending.value: count for ending, count in Counter(ending for ending, _ in endings).items()})
    assert not others, "\n".join(others)
