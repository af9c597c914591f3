import json
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from tests.cli.conftest import FAST

from lamella import cli
from lamella.lab.runs import trainer

MOLA = ["method.name=mola", "method.r=2", "method.num_experts=2"]


def test_a_run_is_json_for_programs_and_is_kept_until_told_otherwise(lamella, bert, questions, run_folder):
    words = ["train", "--model", bert, "--task", questions, *MOLA, *FAST, "-o", run_folder]
    status, out, _ = lamella(*words, "--json")

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

    status, _, err = lamella(*words)
    assert status == 2
    assert "--force" in err
    status, out, err = lamella(*words, "--force")
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


def test_allocate_prints_the_list_and_the_sum(lamella):
    status, out, _ = lamella("allocate", "2-4-6-8", "--layers", "6")
    assert status == 0
    assert out.split() == ["2-2-4-6-6-8", "28", "experts", "in", "6", "layers"]

    _, out, _ = lamella("allocate", "2-4-6-8", "--layers", "30", "--json")
    assert json.loads(out)["sum"] == 148
    _, out, _ = lamella("allocate", "2-4-6-8", "--layers", "30", "--budget", "4", "--json")
    assert json.loads(out)["sum"] == 120


def test_allocate_from_a_model_prints_a_list_to_paste(lamella, bert, questions, prose):
    status, out, _ = lamella(
        "allocate", "--from", bert, "--budget", "3", "--text", questions, "--text", prose, "--rows", "4"
    )
    assert status == 0
    first, counted, *rest = out.splitlines()
    assert counted == "6 experts in 2 layers"
    assert rest[-1] == f"num_experts={[int(count) for count in first.split('-')]}"

    _, out, _ = lamella("allocate", "--from", bert, "--json")
    assert json.loads(out)["criterion"] == "heavy-tails"
    assert json.loads(out)["sum"] == sum(json.loads(out)["experts"]) == 10
    for words in ([], ["--from", bert, "--layers", "2"], ["4", "--layers", "2", "--criterion", "redundancy"]):
        status, _, err = lamella("allocate", *words)
        assert (status, "Give an allocation and --layers" in err) == (2, True)


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


def test_the_version_is_that_of_the_package(lamella):
    assert lamella("--version") == (0, f"lamella {version('lamella')}\n", "")


@pytest.mark.parametrize(("what", "name"), [("methods", "demo"), ("compose", "demo-compose")])
def test_demo_is_a_packaged_study_with_few_rows_if_quick(lamella, monkeypatch, what, name):
    shown = []
    monkeypatch.setattr("lamella.cli.demo.run_study", lambda *given, **options: shown.append((given, options)))
    assert lamella("demo", what, "--quick", "--seeds", "3", "--jobs", "2", "--force")[0] == 0
    ((_, recipe, folder, jobs), options) = shown[0]
    assert (folder, jobs, options) == (Path("runs") / name, 2, {"force": True, "json": False})
    assert {cell.seed for cell in recipe.cells()} == {0, 1, 2}


def test_names_with_brackets_are_shown_as_they_are(capsys):
    from lamella.cli.output import show_run

    metrics = {
        "method": "LoRA [r=8]", "task": "[/b] :smile:", "summary": "[red]", "steps": 1,
        "trainable_parameters": 1, "seconds_per_step": 1, "test": {"[b]": 1.0},
    }  # fmt: skip
    show_run(metrics, Path("[bold]/run"))
    shown = " ".join(capsys.readouterr().err.split())
    assert all(name in shown for name in ("LoRA [r=8] on [/b] :smile:", "[red]", "[b]", "[bold]/run"))


def test_an_interruption_is_a_sentence_and_status_130(lamella, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    for place, attribute in (("lamella.lab.runs.settings", "resolve"), ("lamella.lab.quiet", "quiet_libraries")):
        monkeypatch.setattr(f"{place}.{attribute}", interrupted)
        status, out, err = lamella("train")
        assert (status, out) == (130, "")
        assert err.startswith("Interrupted: a run is kept up to its last checkpoint")
        assert len(err.splitlines()) == 1


def killed_after_its_first_checkpoint(words):
    def sealed(checkpoint, seal=trainer.seal):
        seal(checkpoint)
        os.kill(os.getpid(), signal.SIGKILL)

    trainer.seal = sealed
    sys.argv = ["lamella", *words]
    cli.main()


def test_a_run_that_was_really_killed_goes_on(fresh, lamella, bert, questions, run_folder):
    """SIGKILL between two steps: the strongest interruption there is."""
    words = ["train", "--model", bert, "--task", questions, *MOLA, *FAST, "-o", str(run_folder)]
    process = fresh.Process(target=killed_after_its_first_checkpoint, args=(words,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in (run_folder / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert not (run_folder / "metrics.json").exists()
    assert not (run_folder / "adapter").exists()

    status, out, err = lamella(*words, "--json")
    assert status == 0, err
    assert json.loads(out)["steps"] == 4
    assert "resuming from checkpoint-2" in (run_folder / "log.txt").read_text()
    assert not (run_folder / "checkpoints").exists()
