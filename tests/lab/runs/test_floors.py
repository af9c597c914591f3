import numpy as np
import pytest

from lamella.errors import LamellaError
from lamella.lab.runs.floors import linear_floor, majority_floor

TEXTS = ["who is she", "who are they", "where is it", "where are we"] * 5
LABELS = [0, 0, 1, 1] * 5


def test_words_that_tell_the_classes_apart_are_found():
    assert linear_floor(TEXTS, LABELS, ["who knows", "where to"]).tolist() == [0, 1]


def test_regression_follows_the_words():
    low, high = linear_floor(TEXTS, [float(label) for label in LABELS], ["who is she", "where is it"], regression=True)

    assert low < 0.3 < 0.7 < high


def test_only_the_training_texts_make_the_vocabulary():
    alone = linear_floor(TEXTS, LABELS, ["who is she"])
    beside_others = linear_floor(TEXTS, LABELS, ["who is she", "where where where unseen words"])

    assert alone[0] == beside_others[0]


def test_a_single_class_is_predicted_as_it_is():
    assert linear_floor(["a", "b"], [3, 3], ["c", "d"]).tolist() == [3, 3]


def test_majority():
    assert majority_floor([1, 2, 2], 3).tolist() == [2, 2, 2]


def test_texts_without_labels_are_refused():
    with pytest.raises(LamellaError, match="2 training texts and 1 labels"):
        linear_floor(["a", "b"], np.array([1]), ["c"])
