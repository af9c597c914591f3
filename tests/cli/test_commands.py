import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lamella import cli

FAST = ["batch_size=8", "max_steps=4", "max_length=32", "log_every=2", "evaluate_every=2", "threads=1"]
MOLA = ["method.name=mola", "method.r=2", "method.num_experts=2"]


@pytest.fixture
def lamella(monkeypatch, capsys):
    """Run the command in this process; gives its exit status, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lamella", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    return run


def test_train_prints_one_json_object_and_leaves_a_report(lamella, bert, questions, run_folder):
    status, out, _ = lamella("train", "--model", bert, "--task", questions, *MOLA, *FAST, "-o", run_folder, "--json")

    assert status == 0
    printed = json.loads(out)
    assert printed["folder"] == str(run_folder)
    assert printed["method"] == "mola"
    assert {key: value for key, value in printed.items() if key != "folder"} == json.loads(
        (run_folder / "metrics.json").read_text()
    )
    page = (run_folder / "report.html").read_text()
    assert "The doctor has not examined" not in page
    assert "Redundancy" in page


def test_train_tells_people_the_score_and_the_allocation(lamella, bert, questions, run_folder):
    status, out, err = lamella("train", "--model", bert, "--task", questions, *MOLA, *FAST, "-o", run_folder)

    assert status == 0
    assert "accuracy" in err
    assert "experts per block" in err
    assert out == ""


def test_a_recipe_is_read_and_overridden(lamella, bert, questions, run_folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {bert}\ntask: {questions}\nmethod: head\nseed: 3\n")

    status, out, _ = lamella("train", recipe, *FAST, "seed=4", "-o", run_folder, "--json")

    assert status == 0
    assert (json.loads(out)["method"], json.loads(out)["seed"]) == ("head", 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "epocs=3"], "Did you mean 'epochs'?"),
        (["train", "nowhere.yaml"], "no recipe 'nowhere.yaml'"),
        (["train", "trec-mola", "trec-lora"], "One recipe at a time"),
        (["train", "--task", "file:nowhere.jsonl"], "nowhere.jsonl"),
        (["train", "--task", "treck"], "treck"),
        (["allocate", "2-4-6-8-9", "--layers", "3"], "2-4-6-8-9"),
    ],
)
def test_what_cannot_be_used_is_a_paragraph_and_status_2(lamella, words, message, tmp_path):
    output = ["-o", tmp_path / "run"] if words[0] == "train" else []
    status, out, err = lamella(*words, *output)

    assert status == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""


def test_a_finished_run_is_kept(lamella, bert, questions, run_folder):
    words = ["train", "--model", bert, "--task", questions, "method=head", *FAST, "-o", run_folder]
    assert lamella(*words)[0] == 0

    status, _, err = lamella(*words)
    assert status == 2
    assert "--force" in err
    assert lamella(*words, "--force")[0] == 0


def test_allocate_prints_the_list_and_the_sum(lamella):
    status, out, _ = lamella("allocate", "2-4-6-8", "--layers", "6")
    assert status == 0
    assert out.split() == ["2-2-4-6-6-8", "28", "experts", "in", "6", "layers"]

    _, out, _ = lamella("allocate", "2-4-6-8", "--layers", "30", "--json")
    assert json.loads(out)["sum"] == 148
    _, out, _ = lamella("allocate", "2-4-6-8", "--layers", "30", "--budget", "4", "--json")
    assert json.loads(out)["sum"] == 120


def test_an_error_is_printed_once_and_the_folder_not_made(lamella, bert, questions, run_folder):
    words = ["--model", bert, "--task", questions, "method=lora", "router_lr=1", "-o", run_folder]
    status, _, err = lamella("train", *words)

    assert status == 2
    assert err.count("no trainable router") == 1
    assert not run_folder.exists()


@pytest.mark.parametrize("command", ["train", "demo", "allocate"])
def test_every_help_has_an_example(lamella, command):
    status, out, _ = lamella(command, "--help")

    assert status == 0
    assert f"Example: lamella {command}" in " ".join(out.split())


def test_an_unexpected_error_is_status_1(lamella, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("lamella.lab.runs.settings.resolve", broken)
    monkeypatch.setattr(sys, "argv", ["lamella", "train"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()  # the interpreter prints the traceback and exits with 1


def test_a_run_that_was_really_killed_goes_on(bert, questions, run_folder):
    """SIGKILL between two steps: the strongest interruption there is."""
    words = ["--model", bert, "--task", questions, *MOLA, *FAST, "max_steps=400", "evaluate_every=5", "-o", run_folder]
    command = [sys.executable, "-m", "lamella", "train", *map(str, words), "--json"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(run_folder.glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run_folder / "metrics.json").exists()
    assert not (run_folder / "adapter").exists()

    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 400
    assert "resuming from checkpoint-" in (run_folder / "log.txt").read_text()
    assert not (run_folder / "checkpoints").exists()


@pytest.mark.real
def test_the_quick_demo(tmp_path):
    """From the command to the report, on the real model and questions."""
    command = [
        sys.executable,
        "-m",
        "lamella",
        "demo",
        "--quick",
        "-o",
        str(tmp_path / "demo"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["results"][0]["method"].startswith("floor")
    counts = [row["trainable parameters"] for row in printed["cost"]]
    assert abs(counts[0] - counts[1]) < 0.02 * counts[0]
    assert not [finding for finding in printed["findings"] if finding["severity"] == "error"]
    runs = list((tmp_path / "demo" / "runs").iterdir())
    assert len(runs) == 6
    assert all(json.loads((run / "metrics.json").read_text())["saved_equals_loaded"]["equal"] for run in runs)
    assert "<html" in Path(printed["report"]).read_text()
