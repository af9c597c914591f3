"""What is shown of work that is under way."""

import io
import time

import pytest
from rich.console import Console

from lamella.cli import progress
from lamella.cli.progress import showing
from lamella.progress import Work, working


@pytest.fixture
def shown(monkeypatch):
    """Everything at once and often, on a terminal or elsewhere."""

    def on(terminal, width=100):
        text = io.StringIO()
        kind = {"force_terminal": True, "_environ": {"TERM": "xterm"}} if terminal else {}
        monkeypatch.setattr(progress, "console", Console(file=text, width=width, **kind))
        monkeypatch.setattr(progress, "_SECONDS_UNSEEN", 0.0)
        monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.01)
        return text

    return on


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_pipe_gets_a_line_now_and_then(shown):
    text = shown(terminal=False)
    with showing("compressing"), working("measuring", 4, "models") as work:
        time.sleep(0.01)
        work.reach(2)
        with working("scoring", 8, "batches"):
            until(lambda: "scoring" in text.getvalue())
    lines = text.getvalue().splitlines()
    assert lines[-1].startswith("compressing: measuring: 2 of 4 models, ")
    assert lines[-1].endswith("; scoring: 0 of 8 batches")
    assert len(text.getvalue()) == len(text.getvalue().rstrip()) + 1
    length = len(lines)
    time.sleep(0.05)
    assert len(text.getvalue().splitlines()) == length  # and none when it is done


def test_a_short_work_is_not_shown(shown, monkeypatch):
    text = shown(terminal=False)
    monkeypatch.setattr(progress, "_SECONDS_UNSEEN", 60.0)
    with showing("loading"):
        time.sleep(0.05)
    assert text.getvalue() == ""


def test_a_terminal_gets_a_bar_for_each_work_that_goes_away(shown, capsys):
    text = shown(terminal=True)
    with showing("compressing"), working("measuring", 4, "models") as work:
        work.reach(2)
        work.parts = [Work("another process", 9, "steps", 3)]
        until(lambda: "3 of 9 steps" in text.getvalue())
        print("for a program")
    assert "compressing: measuring" in text.getvalue()
    assert "2 of 4 models, " in text.getvalue()
    assert "━" in text.getvalue()
    assert text.getvalue().endswith("\x1b[2K")  # the line is taken away
    assert text.getvalue().rindex("\x1b[?25h") > text.getvalue().rindex("\x1b[?25l")  # and the cursor is back
    assert capsys.readouterr().out == "for a program\n"  # which reads standard output alone


def test_the_name_gives_way_on_a_narrow_terminal(shown):
    text = shown(terminal=True, width=70)
    with showing(f"a long {'long ' * 20}name"), working("training", 40, "steps"):
        until(lambda: "0 of 40 steps" in text.getvalue())
    assert "…" in text.getvalue()


def test_the_bar_goes_away_after_an_error(shown):
    text = shown(terminal=True)
    with pytest.raises(ZeroDivisionError), showing("dividing"):
        raise ZeroDivisionError
    assert text.getvalue().rindex("\x1b[?25h") > text.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("terminal", [True, False])
def test_of_several_processes_the_first_shows_it(shown, monkeypatch, terminal):
    text = shown(terminal)
    monkeypatch.setenv("RANK", "1")
    with showing("training"):
        time.sleep(0.05)
    assert text.getvalue() == ""
