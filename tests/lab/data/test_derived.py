import json
from dataclasses import replace

import pytest

from lamella.errors import LamellaError
from lamella.lab.data import load_task
from lamella.lab.data.derived import fewer


def write(folder, name, rows, held=10):
    """A task of 20 training, ``held`` validation and 5 test rows."""
    place = folder / name
    place.mkdir()
    for split, part in (("train", rows[:20]), ("validation", rows[20 : 20 + held]), ("test", rows[30:35])):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return f"file:{place}"


def reviews(word, labels=("bad", "good")):
    return [{"text": f"{word} {index}", "label": labels[index % 2]} for index in range(35)]


def texts(task, split):
    return list(task.splits[split]["text"])


@pytest.fixture
def books(tmp_path):
    return write(tmp_path, "books", reviews("book"))


@pytest.fixture
def films(tmp_path):
    return write(tmp_path, "films", reviews("film"))


def test_fewer_training_rows_are_always_the_same_and_those_of_limit(books):
    from lamella.lab.runs.settings import RunSettings
    from lamella.lab.runs.tasks import task_of

    few, whole = load_task(f"{books}@7"), load_task(books)

    assert len(few.splits["train"]) == 7
    assert texts(few, "test") == texts(whole, "test")
    assert texts(few, "train") == texts(load_task(f"{books}@7"), "train")
    limited = task_of(RunSettings.parse({"task": books, "limit": {"train": 7}}))
    assert texts(few, "train") == texts(limited, "train")
    assert load_task(f"{books}@99").splits["train"].num_rows == 20


def test_validation_rows_can_be_fewer_too(books):
    few, whole = load_task(f"{books}@7/4"), load_task(books)

    assert [len(few.splits[split]) for split in ("train", "validation", "test")] == [7, 4, 5]
    assert set(texts(few, "validation")) <= set(texts(whole, "validation"))
    assert texts(few, "train") == texts(load_task(f"{books}@7"), "train")


def test_a_union_has_exactly_the_rows_of_its_parts(books, films):
    union = load_task(f"mix:{books}@7+{films}@9")

    parts = [load_task(f"{books}@7"), load_task(f"{films}@9")]
    for split in ("train", "validation", "test"):
        assert sorted(texts(union, split)) == sorted(text for part in parts for text in texts(part, split))
    assert union.label_names == ("bad", "good")
    assert texts(load_task(f"mix:{books}+{films}", seed=1), "train") != texts(
        load_task(f"mix:{books}+{films}", seed=2), "train"
    )


def test_a_union_does_not_train_on_what_one_of_its_parts_tests(tmp_path, books):
    rows = reviews("film")
    rows[0] = {"text": "book 30", "label": "bad"}  # a test row of the books

    union = load_task(f"mix:{books}+{write(tmp_path, 'films', rows)}")

    assert "book 30" not in texts(union, "train")
    assert any("1 train rows dropped" in note for note in union.notes)


def test_tasks_that_one_head_cannot_serve_are_not_joined(tmp_path, books):
    other = write(tmp_path, "other", reviews("other", ("cold", "warm")))

    with pytest.raises(LamellaError, match=r"different labels: .*'bad', 'good'.*'cold', 'warm'"):
        load_task(f"mix:{books}+{other}")


@pytest.fixture
def prose_and_talk(tmp_path):
    prose = write(tmp_path, "prose", [{"text": f"line {index} of prose"} for index in range(35)])
    talk = write(tmp_path, "talk", [{"prompt": f"say {index}", "completion": f"{index}"} for index in range(35)])
    return prose, talk


def test_prose_joins_prompts_as_completions_of_none(prose_and_talk):
    prose, talk = prose_and_talk
    joined = load_task(f"mix:{prose}+{talk}")

    train = [(row["prompt"], row["completion"]) for row in joined.splits["train"]]
    assert sorted(train) == sorted(
        [("", text) for text in texts(load_task(prose), "train")]
        + [(row["prompt"], row["completion"]) for row in load_task(talk).splits["train"]]
    )


def test_texts_without_a_prompt_do_not_stay_together(prose_and_talk):
    held = load_task(f"held:mix:{prose_and_talk[0]}+{prose_and_talk[1]}")

    for split, most in (("train", 16), ("validation", 4)):
        rows = list(held.splits[split])
        assert len(rows) == most
        assert any(row["prompt"] == "" for row in rows)


def test_held_rows_are_validation_rows_that_nothing_was_trained_on(books, films):
    held, union = load_task(f"held:mix:{books}+{films}"), load_task(f"mix:{books}+{films}")

    assert set(held.splits) == {"train", "validation"}
    both = texts(held, "train") + texts(held, "validation")
    assert sorted(both) == sorted(texts(union, "validation"))
    assert len(held.splits["validation"]) == 4


def test_too_few_rows_are_said(tmp_path, books):
    with pytest.raises(LamellaError, match="asks for 0 train rows"):
        load_task(f"{books}@0")
    with pytest.raises(LamellaError, match="asks for 0 validation rows"):
        load_task(f"{books}@2/0")
    whole = load_task(books)
    with pytest.raises(LamellaError, match=r"asks for validation rows, and .* has train, test rows"):
        fewer("few", replace(whole, splits={"train": whole.splits["train"], "test": whole.splits["test"]}), 2, 3)
    small = write(tmp_path, "small", reviews("x"), held=3)
    with pytest.raises(LamellaError, match="which has 3"):
        load_task(f"held:{small}")
