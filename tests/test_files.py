import errno
import fcntl
import os
import shutil
import stat
import sys

import pandas as pd
import pytest

from lamella.errors import LamellaError
from lamella.files import atomic, claimed, read_json, read_table, read_tensors, read_yaml, write_atomic


def test_a_file_appears_with_its_folder(tmp_path):
    write_atomic(tmp_path / "new" / "one.txt", "text")
    assert (tmp_path / "new" / "one.txt").read_text(encoding="utf-8") == "text"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_there_stays_when_writing_fails_and_nothing_is_left_beside_it(tmp_path, kind):
    target = tmp_path / "it"
    write = {"file": lambda path: path.write_text("old"), "folder": lambda path: path.mkdir()}[kind]

    def fails():
        with atomic(target) as unfinished:
            write(unfinished)
            raise OSError("the disk is full")

    write(target)
    with pytest.raises(OSError, match="the disk is full") as caught:
        fails()
    assert caught.value.filename == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert target.is_dir() if kind == "folder" else target.read_text() == "old"


def test_another_file_that_cannot_be_read_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic(tmp_path / "it") as unfinished:
        shutil.copyfile(tmp_path / "gone", unfinished)
    assert caught.value.filename == str(tmp_path / "gone")


def test_a_folder_takes_the_place_of_another_whole(tmp_path):
    (tmp_path / "it" / "old").mkdir(parents=True)
    with atomic(tmp_path / "it") as unfinished:
        (unfinished / "new").mkdir(parents=True)
    assert [path.name for path in (tmp_path / "it").iterdir()] == ["new"]


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path):
    (tmp_path / "it" / "old").mkdir(parents=True)
    with pytest.raises(OSError, match="it"):
        write_atomic(tmp_path / "it", "text")
    assert (tmp_path / "it" / "old").is_dir()


def test_what_is_written_lies_as_deep_as_it_will(tmp_path):
    with atomic(tmp_path / "it") as unfinished:
        unfinished.mkdir()
        assert unfinished.parent == tmp_path


@pytest.mark.parametrize("read", [read_json, read_yaml, read_table, read_tensors])
@pytest.mark.parametrize("content", [None, "folder", b"", b"[1, 2", b"\xff\x00\x81", b"[" * 3000, b"PAR1" * 20])
def test_what_cannot_be_read_is_named(tmp_path, read, content):
    path = tmp_path / "it"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)

    with pytest.raises(LamellaError, match=r"it (cannot be read|is not valid|holds)"):
        read(path)


@pytest.mark.parametrize(
    ("read", "content", "said"),
    [
        (read_yaml, "a: 1\nb: {c: 1, d: [{e: 1}, {e: 2, e: 3}]}", "'e' is given twice, again in line 2"),
        (read_yaml, "a: 1\nb: 2\na: 1", "'a' is given twice, again in line 3"),
        (read_yaml, "a: 1\nb:\n\tc: 1", r"found character '\\t' that cannot start any token in line 3"),
        (read_json, '{"a": [{"b": 1, "b": 1}]}', "'b' is given twice"),
    ],
)
def test_what_would_be_read_otherwise_than_it_looks_is_refused(tmp_path, read, content, said):
    (tmp_path / "it").write_text(content)

    with pytest.raises(LamellaError, match=said):
        read(tmp_path / "it")


def test_what_a_mapping_takes_over_may_be_given_anew(tmp_path):
    (tmp_path / "it").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]")

    assert read_yaml(tmp_path / "it")["b"] == {"x": 3, "y": 2}


def test_a_table_without_a_column_is_named(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "it")

    assert read_table(tmp_path / "it", "a")["a"].tolist() == [1]
    with pytest.raises(LamellaError, match="no column 'b'"):
        read_table(tmp_path / "it", "a", "b")


def test_a_file_is_claimed_where_only_a_writer_may_lock_it(tmp_path, monkeypatch):
    """As NFS has it."""
    lock = fcntl.flock

    def flock(descriptor, how):
        can_write = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and not can_write:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    for path in (tmp_path / "locks" / "it", tmp_path):
        with claimed(path) as mine, claimed(path) as again:
            assert (mine, again) == (True, False)


def test_where_there_are_no_locks_all_is_claimed(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with claimed(tmp_path / "locks" / "it") as mine, claimed(tmp_path) as folder:
        assert mine
        assert folder
        (tmp_path / "locks" / "it").write_text("its folder is there")
