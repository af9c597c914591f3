import json
import subprocess
import sys

import pytest
from tests.cli.test_commands import FAST, lamella  # noqa: F401
from tests.lab.tiny_runs import tiny_settings

from lamella.lab.runs.run import train


@pytest.fixture(scope="module", params=["bert", "llama"])
def runs(request, tmp_path_factory):
    """Two runs of LoRA on one base, the base, and their task."""
    base = request.getfixturevalue(request.param)
    task = request.getfixturevalue({"bert": "questions", "llama": "prose"}[request.param])
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        train(tiny_settings(base, task, {"name": "lora", "r": 2}, seed=seed), folder / name)
    return folder, base, task


def test_compose_trains_routers_and_leaves_a_run(lamella, runs, run_folder):  # noqa: F811
    folder, base, task = runs
    words = ["compose", "--adapters", f"one={folder / 'first'}", folder / "second" / "adapter", "--task", task, *FAST]

    status, out, err = lamella(*words, "method.granularity=network", "-o", run_folder, "--json")

    assert status == 0, err
    printed = json.loads(out)
    assert (printed["method"], printed["model"]) == ("mole", base)
    assert printed["saved_equals_loaded"]["equal"]
    assert "MOLE of 2 LoRAs" in printed["summary"]
    assert (run_folder / "report.html").is_file()
    assert "granularity: network" in (run_folder / "run.yaml").read_text()
    assert str(folder) not in (run_folder / "adapter" / "README.md").read_text()
    config = json.loads((run_folder / "adapter" / "adapter_config.json").read_text())
    assert list(config["adapters"]) == ["one", "second"]
    status, out, _ = lamella("evaluate", run_folder, "--json")
    assert status == 0
    assert json.loads(out)["metrics"] == pytest.approx(printed["test"])
    assert lamella("doctor", run_folder)[0] == 0


def test_compose_check_trains_nothing(lamella, runs, run_folder):  # noqa: F811
    folder, _, task = runs
    words = ["compose", "--adapters", folder / "first", folder / "second", "--task", task, *FAST, "-o", run_folder]

    status, out, _ = lamella(*words, "--check", "--json")

    assert status == 0
    assert json.loads(out)["estimate"]["steps"] == 4
    assert not run_folder.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapters", "{}/first"], "at least two LoRAs"),
        (["--adapters", "{}/first", "first={}/second"], "Two LoRAs are called 'first'"),
        (["--adapters", "{}/first", "x=nowhere"], "'nowhere' is no file or folder here"),
        (["--adapters", "{}/first", "x="], "write NAME=PLACE"),
        (["--adapters", "{}/first", "{}/second", "method.topk=1"], "method.topk"),
    ],
)
def test_what_cannot_be_composed_is_status_2(lamella, runs, run_folder, words, message):  # noqa: F811
    folder, _, task = runs

    status, out, err = lamella("compose", *(word.format(folder) for word in words), "--task", task, "-o", run_folder)

    assert (status, out) == (2, "")
    assert message in " ".join(err.split())
    assert not run_folder.exists()


def test_help_has_an_example(lamella):  # noqa: F811
    status, out, _ = lamella("compose", "--help")

    assert status == 0
    assert "Example: lamella compose --adapters" in " ".join(out.split())


@pytest.mark.real
def test_smollm2_composes_loras_of_two_kinds_of_prose(tmp_path):
    few = ["max_steps=2", "batch_size=2", "eval_batch_size=2", "max_length=32", "evaluate_every=100", "keep=last"]
    few += ["limit={train: 8, validation: 2, test: 2}", "--model", "smollm2", "--json"]

    def run(*words):
        done = subprocess.run([sys.executable, "-m", "lamella", *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    for task in ("news", "dialogue"):
        run("train", "method=lora", "--task", task, *few, "-o", tmp_path / task)
    found = run("compose", "--adapters", tmp_path / "news", tmp_path / "dialogue", "--task", "news", *few,
                "-o", tmp_path / "both")  # fmt: skip

    assert found["saved_equals_loaded"]["equal"]
    assert found["test"]["perplexity"] < 1000
