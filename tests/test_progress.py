"""How far long work is, as it says itself."""

import pickle

import pytest

from lamella import progress
from lamella.progress import Work, counted, listening, under_way, working


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_rate_and_rest_are_of_this_start_alone(clock):
    with working("aligning", 10, "tiles", done=6) as work:
        assert str(work) == "aligning: 6 of 10 tiles"
        clock(8)
        work.advance()
        clock(12)
        work.advance()
    assert work.rate == pytest.approx(2 / 20)
    assert str(work) == "aligning: 8 of 10 tiles, 10 s each, 20 s left"


def test_the_rest_grows_shorter_while_nothing_is_said(clock):
    with working("the study", 3, "jobs") as work:
        clock(600)
        work.advance()
        clock(300)
        assert work.left == pytest.approx(900)
        assert work.rate == pytest.approx(1 / 600)
        clock(2000)
        assert work.left is None  # rather than nothing, for hours


def test_what_is_known_better_than_the_rate_is_believed(clock):
    with working("the study", 3, "jobs") as work:
        clock(1)
        work.reach(1, left=7200)
        clock(60)
        assert work.facts == "1 of 3 jobs, 1.00/s, 2.0 h left"
        assert work.left == 7140


def test_what_cannot_be_counted_says_how_long_it_has_taken(clock):
    with working("loading") as work:
        clock(150)
        assert str(work) == "loading: 2.5 minutes so far"
        assert (work.rate, work.left) == (None, None)


def test_of_a_count_without_an_end_nothing_is_left(clock):
    with working("reading", None, "documents") as work:
        clock(2)
        work.reach(4)
        assert work.left is None
        assert work.facts == "4 documents, 2.00/s"


def test_a_piece_is_done_when_the_next_is_asked_for():
    told = []
    with listening(lambda work: told.append((work.done, work.total))):
        for item in counted("ab", "reading", "letters"):
            assert [work.done for work in under_way()] == ["ab".index(item)]
        for _ in counted(iter("ab"), "reading", total=2):
            pass
    assert told == [(1, 2), (2, 2)] * 2
    assert under_way() == []


def test_what_was_interrupted_is_not_under_way():
    def broken():
        for _ in counted("ab", "reading"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert under_way() == []


def test_what_cannot_be_counted_names_what_is_inside_it(clock):
    with working("the study", 2, "jobs"), working("LoRA on trec") as cell:
        assert [work.name for work in under_way()] == ["the study", "LoRA on trec"]
        with working("training", 4, "steps"), working("scoring", 9, "batches"):
            names = ["the study", "LoRA on trec: training", "scoring"]
            assert [work.name for work in under_way()] == names
            clock(3)
            with working("loading"):
                assert [work.name for work in under_way(older_than=2)] == names
        assert cell.name == "LoRA on trec"


def test_parts_of_other_processes_stand_in_the_place_of_what_they_are_parts_of():
    with working("the study", 2, "jobs"), working("2 processes") as together:
        assert [work.name for work in under_way()] == ["the study", "2 processes"]
        together.parts = pickle.loads(pickle.dumps([Work("LoRA: training", 4, "steps", 1), Work("MoLA: loading")]))
        assert [work.name for work in under_way()] == ["the study", "LoRA: training", "MoLA: loading"]
