import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from lamella.cli import progress
from lamella.cli.progress import Bar


def follow(monkeypatch, *, terminal, seconds, first=0):
    """What is shown of a training of four steps that takes so many seconds a step."""
    shown, now = io.StringIO(), [100.0]
    monkeypatch.setattr(progress, "console", Console(file=shown, force_terminal=terminal, width=120))
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    state = SimpleNamespace(is_world_process_zero=True, global_step=first, max_steps=4)
    with Bar() as bar:
        bar.on_train_begin(None, state, None)
        for step in range(first + 1, 5):
            now[0] += seconds
            state.global_step = step
            bar.on_log(None, state, None, logs={"loss": 1 / step})
            bar.on_step_end(None, state, None)
    return shown.getvalue()


def test_a_pipe_gets_a_line_now_and_then(monkeypatch):
    lines = follow(monkeypatch, terminal=False, seconds=20).splitlines()
    assert lines == [
        "step 2 of 4, loss 0.500, 0.05/s, 0.7 minutes left",
        "step 4 of 4, loss 0.250, 0.05/s, 0.0 minutes left",
    ]
    assert follow(monkeypatch, terminal=False, seconds=1) == ""


def test_the_rate_of_a_resumed_run_counts_its_steps_alone(monkeypatch):
    assert "0.02/s" in follow(monkeypatch, terminal=False, seconds=50, first=2)


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch):
    shown = follow(monkeypatch, terminal=True, seconds=1)
    assert "4/4" in shown
    assert "1.00/s" in shown
    assert "minutes left" not in shown


def test_the_bar_goes_away_after_an_error(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=shown, force_terminal=True))
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=4)

    def broken():
        with Bar() as bar:
            bar.on_train_begin(None, state, None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert "\x1b[?25h" in shown.getvalue()  # the cursor is back


def test_only_the_first_process_shows_it(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=shown, force_terminal=True))
    state = SimpleNamespace(is_world_process_zero=False, global_step=1, max_steps=4)
    with Bar() as bar:
        bar.on_train_begin(None, state, None)
        bar.on_step_end(None, state, None)
    assert shown.getvalue() == ""
