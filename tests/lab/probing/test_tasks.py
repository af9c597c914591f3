"""Properties, their balance and split, and their controls, on sentences made by hand."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from lamella.errors import LamellaError
from lamella.lab.data import load_task
from lamella.lab.probing import tasks
from lamella.lab.probing.tasks import Sentences, properties_of, sentences_of


@pytest.fixture
def by_name(sentences):
    return {one.name: one for one in properties_of(sentences, 200)[0]}


def named(one):
    return list(zip(one.texts, (one.classes[label] for label in one.labels), strict=True))


def test_every_property_is_balanced_and_no_sentence_is_in_two_parts(by_name):
    assert list(by_name) == ["length", "word content", "bigram shift", "odd word out", "class"]
    for one in by_name.values():
        assert len(set(np.bincount(one.labels))) == 1
        rows = np.concatenate(list(one.parts.values()))
        assert sorted(rows) == list(range(len(one.texts)))
        assert len(set(one.texts)) == len(one.texts)
        each = len(one.texts) // len(one.classes)
        assert [len(part) // len(one.classes) for part in one.parts.values()] == pytest.approx(
            [each * share for share in (0.5, 0.2, 0.3)], abs=1
        )
        assert one.floor == pytest.approx(1 / len(one.classes))


def test_a_length_is_a_quarter_and_a_word_the_only_one_of_those_asked(by_name):
    for text, name in named(by_name["length"]):
        first, last = map(int, name.removesuffix(" words").split("-"))
        assert first <= len(text.split()) <= last
    asked = by_name["word content"].classes
    for text, name in named(by_name["word content"]):
        assert [word for word in asked if word in text.split()] == [name]


def test_a_shift_exchanges_two_neighbours_and_leaves_the_others_as_written(by_name, sentences):
    written = {" ".join(sorted(text.split())): text for text in sentences.texts}
    for text, name in named(by_name["bigram shift"]):
        words, original = text.split(), written[" ".join(sorted(text.split()))].split()
        unlike = [at for at, (one, other) in enumerate(zip(words, original, strict=True)) if one != other]
        assert unlike == [] if name == "as written" else len(unlike) == unlike[1] - unlike[0] + 1 == 2


def test_a_shift_touches_no_capital_number_or_mark():
    texts = tuple(f"Where , in {year} , did they sail ?" for year in range(1900, 1960))
    for text, name in tasks._shift(Sentences(texts, None)):
        assert text.split()[:3] == ["Where", ",", "in"]
        assert name == "as written" or text.split()[5:] in (["they", "did", "sail", "?"], ["did", "sail", "they", "?"])


def test_an_odd_word_is_a_content_word_of_like_frequency(by_name, sentences):
    counts = Counter(word for text in sentences.texts for word in set(text.split()))
    for text, name in named(by_name["odd word out"]):
        if name == "as written":
            assert text in sentences.texts
            continue
        words = text.split()
        near = [
            (words[at], other.split()[at])
            for other in sentences.texts
            if len(other.split()) == len(words)
            for at in range(len(words))
            if words[:at] + words[at + 1 :] == other.split()[:at] + other.split()[at + 1 :]
        ]
        assert text not in sentences.texts
        assert any(
            0.5 < counts[new] / counts[old] < 2 and {new, old}.isdisjoint(tasks.CLOSED_CLASS) for new, old in near
        )


def test_a_control_goes_by_how_a_text_begins_and_is_as_balanced(by_name):
    one = by_name["class"]  # six subjects, two classes: one word is enough
    labels = one.control(0)
    of_first = {}
    for text, label in zip(one.texts, labels, strict=True):
        assert of_first.setdefault(text.split()[0], label) == label
    assert np.bincount(labels) == pytest.approx(len(labels) / 2, abs=len(labels) / 12)
    assert any((one.control(seed) != labels).any() for seed in range(1, 6))
    assert (one.control(0) == labels).all()


def test_a_control_takes_as_many_words_as_keep_it_balanced(by_name):
    one = replace(by_name["class"], texts=tuple(f"what {text}" for text in by_name["class"].texts))
    assert set(one._beginnings()) == {f"what {one}" for one in ("she", "they", "we", "who", "you", "he")}


def test_the_commonest_classes_are_taken_so_that_most_rows_are_left():
    assert tasks._classes(Counter(a=100, b=90, c=80, d=5), 1000) == (["a", "b", "c"], 80)
    assert tasks._classes(Counter(a=100, b=90, c=80, d=5), 60) == (["a", "b", "c"], 20)  # of equally many, classes
    assert tasks._classes(Counter(a=100), 60) == ([], 0)


def test_a_rare_class_is_left_out_and_it_is_said(sentences):
    rare = replace(sentences, classes=("rare", *sentences.classes[1:]))
    made, notes = properties_of(rare, 200)
    assert next(one for one in made if one.name == "class").classes == ("many", "one")
    assert any("class: left out for balance" in note and note.endswith("rare") for note in notes)


def test_prose_is_cut_at_full_stops_and_a_sentence_counts_once(tmp_path):
    rows = tmp_path / "rows.jsonl"
    text = '{"text": "A first sentence of this sort. Too short! The number is %d , they said ."}\n'
    rows.write_text("".join(text % number for number in range(20)))
    found = sentences_of(load_task(f"file:{rows}"))
    assert found.classes is None
    assert Counter(text.split()[0] for text in found.texts) == {"A": 1, "The": 20}


def test_other_rows_and_too_few_of_them_are_refused(sentences, pairs):
    with pytest.raises(LamellaError, match=r"are not one text each.*--text trec"):
        sentences_of(load_task(pairs))
    with pytest.raises(LamellaError, match=r"at most 10 rows are too few.*--rows"):
        properties_of(sentences, 10)
    with pytest.raises(LamellaError, match="3 sentences and"):
        properties_of(Sentences(sentences.texts[:3], None), 2000)
