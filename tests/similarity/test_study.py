import pandas as pd
import pytest

from lamella.errors import LamellaError
from lamella.similarity.study import StudyFolder, Subject

SUBJECT = Subject("tiny-moe", "news", documents=10)


def test_what_a_study_is_of_survives_and_cannot_change(tmp_path):
    folder = StudyFolder(tmp_path / "study")
    folder.begin(SUBJECT)
    folder.begin(SUBJECT)
    assert folder.subject() == SUBJECT
    with pytest.raises(LamellaError, match="text 'news' there, 'law' here"):
        folder.begin(Subject("tiny-moe", "law", documents=10))
    assert folder.subject() == SUBJECT


def test_tables_and_notes_are_kept_and_a_missing_one_names_its_command(tmp_path):
    folder = StudyFolder(tmp_path)
    assert folder.table("screen") is None
    with pytest.raises(LamellaError, match="lamella similarity screen"):
        folder.needed("screen", "screen")
    frame = pd.DataFrame({"a": [1, 2]})
    folder.write("screen", frame)
    pd.testing.assert_frame_equal(folder.needed("screen", "screen"), frame)
    assert folder.facts("distance") is None
    folder.note("distance", {"slope": 0.5})
    assert folder.facts("distance") == {"slope": 0.5}


def test_a_folder_without_a_study_says_how_to_begin(tmp_path):
    with pytest.raises(LamellaError, match="lamella similarity capture"):
        StudyFolder(tmp_path).subject()
