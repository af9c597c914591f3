import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella import LamellaError
from lamella.lab.data.splitting import build_task, complete_published, split_whole, without_overlap
from lamella.texts.rows import hold_out

TEXTS = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=40)


def rows_of(texts):
    return [{"text": text, "label": len(text) % 2} for text in texts]


@given(TEXTS, st.integers(0, 10), st.integers(0, 10))
def test_every_distinct_row_lands_in_exactly_one_split(texts, test, validation):
    splits, _ = split_whole("classification", rows_of(texts), test=test, validation=validation)
    placed = [row["text"] for rows in splits.values() for row in rows]
    assert sorted(placed) == sorted(set(texts))
    assert len(splits["test"]) == min(test, len(set(texts)))


@given(TEXTS, st.randoms())
def test_what_is_held_out_does_not_depend_on_the_order_of_rows(texts, random):
    shuffled = random.sample(texts, len(texts))
    one, two = (split_whole("classification", rows_of(t), test=3, validation=2)[0] for t in (texts, shuffled))
    for split in one:
        assert {row["text"] for row in one[split]} == {row["text"] for row in two[split]}


def test_groups_stay_whole():
    rows = [{"text": str(number), "group": number // 5} for number in range(50)]
    kept, held = hold_out(rows, 12, lambda row: str(row["group"]))
    assert len(held) == 15
    assert not {row["group"] for row in kept} & {row["group"] for row in held}


def test_train_rows_that_occur_in_evaluation_are_dropped_by_any_label():
    splits = {
        "train": [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": 0}],
        "validation": [{"text": "b", "label": 0}, {"text": "t", "label": 0}],
        "test": [{"text": "a", "label": 0}, {"text": "t", "label": 1}],
    }
    clean, notes = without_overlap("classification", splits)
    assert {split: [row["text"] for row in rows] for split, rows in clean.items()} == {
        "train": ["c"],
        "validation": ["b"],
        "test": ["a", "t"],
    }
    assert notes == [
        "1 validation rows dropped because they also occur in the test split",
        "2 train rows dropped because they also occur in an evaluation split",
    ]


def test_a_split_that_would_vanish_is_refused():
    rows = rows_of(["a", "b"])
    with pytest.raises(LamellaError, match="All 2 validation rows of 'a task' also occur among those that test it"):
        build_task(
            "a task",
            "classification",
            {"train": rows_of(["c"]), "validation": rows, "test": rows},
            source="",
            licence="",
        )


def test_reordered_choices_are_the_same_question():
    splits = {
        "train": [{"question": "q", "choices": ["a", "b"], "label": 0}],
        "test": [{"question": "q", "choices": ["b", "a"], "label": 1}],
    }
    assert without_overlap("multiple-choice", splits)[0]["train"] == []


def test_published_evaluation_rows_stay_as_they_are():
    test = rows_of(["x", "x", "yy"])
    splits, notes = complete_published("classification", {"train": rows_of(["a", "a", *"bcdefghijk"]), "test": test})
    assert splits["test"] == test
    assert len(splits["validation"]) == 1
    assert len(splits["train"]) == 10
    assert notes[0] == "1 exact duplicates dropped from train"


def test_a_lone_validation_split_becomes_the_test():
    splits, notes = complete_published("classification", {"train": rows_of("abcd"), "validation": rows_of("yz")})
    assert [row["text"] for row in splits["test"]] == ["y", "z"]
    assert notes[0] == "the published validation rows are the test split"


def test_the_seed_orders_training_rows_and_nothing_else():
    splits = {"train": rows_of("abcdefghij"), "test": rows_of("xyz")}
    facts = {"label_names": ("odd", "even"), "source": "here", "licence": "none"}
    one, two = (build_task("made", "classification", splits, seed=seed, **facts) for seed in (1, 2))
    assert one.splits["train"]["text"] != two.splits["train"]["text"]
    assert sorted(one.splits["train"]["text"]) == sorted(two.splits["train"]["text"])
    assert one.splits["test"]["text"] == two.splits["test"]["text"] == ["x", "y", "z"]


def test_prose_keeps_its_order():
    splits = {"train": [{"text": letter} for letter in "abcdef"]}
    assert build_task("made", "causal-lm", splits, source="", licence="", seed=5).splits["train"]["text"] == list(
        "abcdef"
    )
