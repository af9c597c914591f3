"""Ctrl-C: one sentence, status 130, and what is kept."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.cli.conftest import FAST
from tests.lab.tiny_studies import write_study

import lamella_command
from lamella.cli.interruption import interruptible
from lamella.progress import listening

SENTENCE = "Interrupted: it is kept, and the same command goes on from there."


def pressed(*_):
    signal.raise_signal(signal.SIGINT)


def test_it_is_a_sentence_and_a_status_and_the_handler_is_put_back(capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end, interruptible(SENTENCE):
        pressed()
    assert end.value.code == 130
    assert capsys.readouterr() == ("", f"{SENTENCE}\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_what_it_turns_into_on_its_way_is_no_error(capsys):
    def importing():
        try:
            pressed()
        except KeyboardInterrupt as error:
            raise ImportError("cannot import name") from error

    with pytest.raises(SystemExit) as end, interruptible(SENTENCE):
        importing()
    assert end.value.code == 130
    assert capsys.readouterr().err == f"{SENTENCE}\n"


def test_an_error_without_it_stays_an_error():
    with pytest.raises(ImportError), interruptible(SENTENCE):
        raise ImportError


def test_where_python_drops_it_it_comes_again(capsys):
    class Deleted:
        def __del__(self):
            pressed()

    def working_on():
        one = Deleted()
        del one
        time.sleep(20)

    with pytest.raises(SystemExit) as end, interruptible(SENTENCE):
        working_on()
    assert end.value.code == 130
    assert capsys.readouterr().err == f"{SENTENCE}\n"


def test_where_it_is_ignored_it_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible(SENTENCE):
            pressed()
    finally:
        signal.signal(signal.SIGINT, before)


def clean_up_for_ever(path):
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), 2)
    with interruptible(SENTENCE):
        try:
            pressed()
        finally:
            pressed()
            time.sleep(60)


def test_the_second_ends_it_at_once(fresh, tmp_path):
    process = fresh.Process(target=clean_up_for_ever, args=(tmp_path / "err",))
    process.start()
    process.join()
    assert process.exitcode == 130
    assert (tmp_path / "err").read_text() == f"{SENTENCE}\n"


def around(path, moment):
    """The start of the command, and Ctrl-C at one of its moments."""
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), 2)

    def run():
        if moment == "first":
            pressed()
        if moment == "twice":
            with interruptible(SENTENCE):
                pressed()

    try:
        lamella_command.take_over(run)
    finally:
        pressed()


@pytest.mark.parametrize(
    ("moment", "said"),
    [
        ("first", "Interrupted before anything began.\n"),
        ("last", "Interrupted when all was done and written.\n"),
        ("twice", f"{SENTENCE}\n"),
    ],
)
def test_before_and_after_the_command_it_ends_at_once(fresh, tmp_path, moment, said):
    process = fresh.Process(target=around, args=(tmp_path / "err", moment))
    process.start()
    process.join()
    assert process.exitcode == 130
    assert (tmp_path / "err").read_text() == said


def interrupted(lamella, words, at, done=1):
    """What is said of a command, Ctrl-C when so much is done of the work of this name."""

    def listen(work):
        if (work.name, work.done) == (at, done):
            pressed()

    with listening(listen):
        status, out, err = lamella(*words)
    assert (status, out) == (130, "")
    last = " ".join(err.split()).rpartition("Interrupted: ")[2]
    assert last.endswith(".")
    assert "Traceback" not in err
    return last


def test_a_run_goes_on_from_its_checkpoint(lamella, bert, questions, run_folder):
    words = ["train", "--model", bert, "--task", questions, *FAST, "-o", run_folder]
    seen = []

    def listen(work):
        seen.append((work.name, work.done, work.note))
        if (work.name, work.done) == ("training", 3):
            pressed()

    with listening(listen):
        status, _, err = lamella(*words)
    assert (status, err) == (
        130,
        "Interrupted: a run is kept up to its last checkpoint, and the same command goes on from there.\n",
    )
    seen.clear()
    with listening(lambda work: seen.append((work.name, work.done, work.total, work.rate))):
        assert lamella(*words)[0] == 0
    steps = [(done, total) for name, done, total, _ in seen if name == "training"]
    assert steps == [(3, 4), (4, 4)]
    assert (run_folder / "metrics.json").is_file()


def test_a_study_goes_on_with_what_is_not_done(lamella, bert, questions, tmp_path):
    recipe = write_study(tmp_path / "study.yaml", bert, questions)
    words = ["compare", recipe, "seeds=1", "-o", tmp_path / "out"]
    said = interrupted(lamella, words, "running")
    assert said == (
        "finished cells are kept, others up to their last checkpoint, and the same command goes on from there."
    )
    (row,) = (tmp_path / "out" / "rows").iterdir()
    written = row.stat().st_mtime_ns
    assert interrupted(lamella, words, "training", done=3) == said
    steps = []
    with listening(lambda work: work.name == "training" and steps.append(work.done)):
        assert interrupted(lamella, words, "running", done=2) == said
    assert steps[0] == 3  # from the checkpoint of step 2
    assert row.stat().st_mtime_ns == written
    assert len(list(row.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "at"),
    [
        (["evaluate", "RUN"], "scoring"),
        (["trace", "RUN", "-o", "OUT"], "scoring"),
        (["allocate", "--from", "RUN", "--criterion", "contribution"], "scoring"),
        (["export", "RUN", "--collapse", "-o", "OUT"], "reading"),
    ],
)
def test_what_keeps_nothing_says_so(lamella, mola_run, tmp_path, words, at):
    given = {"RUN": mola_run, "OUT": tmp_path / "out"}
    said = interrupted(lamella, [given.get(word, word) for word in words], at)
    assert said == "nothing was written, and the same command begins anew."
    assert not (tmp_path / "out").exists()


def test_a_library_keeps_what_was_read(lamella, lora_runs, tmp_path):
    index = tmp_path / "index"
    words = ["library", "index", lora_runs, "--index", index]
    assert "the LoRAs that were read are in the index" in interrupted(lamella, words, "indexing")
    seen = []
    with listening(lambda work: seen.append((work.done, work.total))):
        status, out, _ = lamella(*words, "--json")
    assert (status, json.loads(out)["loras"]) == (0, 2)
    assert seen == [(1, 1)]  # the other one is in the index


MOMENTS = {
    "loading": lambda out: True,
    "beginning": lambda out: (out / "locks").exists(),
    "training": lambda out: any(out.glob("runs/*/checkpoints/checkpoint-*")),
}


@pytest.mark.heavy  # interpreters of their own
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_terminal_sends_it_to_every_process(bert, questions, tmp_path, jobs, moment):
    out = tmp_path / "out"
    recipe = write_study(tmp_path / "study.yaml", bert, questions, max_steps=20_000)
    words = ["compare", recipe, "-o", str(out), "--jobs", str(jobs)]
    process = subprocess.Popen(
        [sys.executable, "-m", "lamella_command", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    time.sleep(0.5)
    while not MOMENTS[moment](out):
        time.sleep(0.1)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    said, err = process.communicate(timeout=120)
    assert (process.returncode, said) == (130, "")
    assert err.count("Interrupted") == 1
    assert "Traceback" not in err
    end = time.monotonic() + 60
    while is_alive(process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_alive(process.pid)


def is_alive(group):
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
