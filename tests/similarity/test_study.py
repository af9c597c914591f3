import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tests.tiny_moe import VOCAB, build

from lamella.errors import LamellaError
from lamella.files import claimed
from lamella.similarity.activations import Manifest, capture
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
    folder.begin(replace(SUBJECT, batch_size=2))  # decides nothing that was found
    assert folder.subject() == replace(SUBJECT, batch_size=2)


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


def test_a_step_is_taken_by_one_process_at_a_time(tmp_path):
    folder = StudyFolder(tmp_path / "study")
    with folder.alone("swap"):
        with folder.alone("screen"):
            pass
        again = folder.alone("swap")
        with pytest.raises(LamellaError, match=r"Another process is at work on this step .* Let it finish"), again:
            pass
    with folder.alone("swap"):
        pass


def test_a_capture_is_written_by_one_process_at_a_time(tmp_path):
    folder = StudyFolder(tmp_path)
    folder.capture.mkdir()
    with claimed(folder.capture), pytest.raises(LamellaError, match=r"Another process is capturing into .* another"):
        capture(build("qwen2_moe"), [], folder.capture)
    folder.capture.rmdir()
    with pytest.raises(LamellaError, match="nothing to capture"):
        capture(build("qwen2_moe"), [], folder.capture)
    assert not folder.capture.exists()


def taken(folder, seed=0):
    """A capture of six documents in a study's folder, in the place of what was there."""
    if folder.capture.is_dir():
        shutil.rmtree(folder.capture)
    draw = torch.Generator().manual_seed(seed)
    batches = [{"input_ids": torch.randint(3, VOCAB, (6, 8), generator=draw)}]
    return capture(build("qwen2_moe"), batches, folder.capture, per_expert=4)


def test_a_table_of_another_capture_is_refused(tmp_path):
    folder = StudyFolder(tmp_path)
    frame = pd.DataFrame({"a": [1, 2]})
    frame.attrs = {"notes": ["one"]}
    taken(folder)
    folder.write("screen", frame)
    frame.to_parquet(tmp_path / "swap.parquet")  # says of no capture
    assert folder.needed("screen", "screen").attrs["notes"] == ["one"]
    taken(folder)  # the same again
    assert not folder.is_stale("screen")
    taken(folder, seed=1)
    assert folder.is_stale("screen")
    assert not folder.is_stale("swap")
    assert not folder.is_stale("alignment")
    for read in (folder.table, lambda name: folder.needed(name, "screen")):
        with pytest.raises(LamellaError, match=r"screen\.parquet was made from another capture \(6 documents of hash"):
            read("screen")
    folder.write("screen", frame)
    pd.testing.assert_frame_equal(folder.table("screen"), frame)
    shutil.rmtree(folder.capture)  # kept results come without it
    assert folder.table("screen") is not None


def test_a_capture_that_is_not_finished_is_refused(tmp_path):
    folder = StudyFolder(tmp_path)
    folder.begin(SUBJECT)
    taken(folder)
    assert folder.captured().manifest.rows_done == 6
    replace(Manifest.read(folder.capture), complete=False).write(folder.capture)
    with pytest.raises(LamellaError, match=r"has 6 documents so far.*`lamella similarity capture tiny-moe --text news"):
        folder.captured()
