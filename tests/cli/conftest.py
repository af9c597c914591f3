import sys

import pytest
from tests.lab.conftest import bert, llama, once, prose, questions, run_folder
from tests.lab.tiny_runs import tiny_settings

from lamella import cli
from lamella.lab.runs.run import train

__all__ = ["bert", "llama", "prose", "questions", "run_folder"]
FAST = ["batch_size=8", "max_steps=4", "max_length=32", "log_every=2", "evaluate_every=2", "threads=1"]


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


@pytest.fixture(scope="session")
def mola_run(bert, questions, tmp_path_factory):
    """The folder of a trained mixture, which no test changes."""
    method = {"name": "mola", "r": 2, "num_experts": [2, 3], "top_k": 2}
    settings = tiny_settings(bert, questions, method)
    return once(tmp_path_factory, "mola", lambda folder: train(settings, folder))


@pytest.fixture(scope="session")
def lora_runs(bert, questions, tmp_path_factory):
    """The folder of two trained LoRAs, first and second, which no test changes."""

    def make(folder):
        for seed, name in enumerate(("first", "second")):
            train(tiny_settings(bert, questions, {"name": "lora", "r": 2}, seed=seed), folder / name)

    return once(tmp_path_factory, "loras", make)
