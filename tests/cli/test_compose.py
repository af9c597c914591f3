import json

import pandas as pd
import pytest
from tests.cli.conftest import FAST


def test_compose_trains_routers_and_leaves_a_run(lamella, bert, lora_runs, questions, run_folder):
    words = [
        "compose",
        "--adapters",
        f"one={lora_runs / 'first'}",
        lora_runs / "second" / "adapter",
        "--task",
        questions,
        *FAST,
    ]

    status, out, err = lamella(*words, "method.granularity=network", "-o", run_folder, "--json")

    assert status == 0, err
    printed = json.loads(out)
    assert (printed["method"], printed["model"]) == ("mole", bert)
    assert printed["saved_equals_loaded"]["equal"]
    assert "MOLE of 2 LoRAs" in printed["summary"]
    page = (run_folder / "report.html").read_text()
    assert "one alone" in page
    assert "layer 0, attention.self.query, expert" not in page
    check_controls(printed, lora_runs)
    assert "granularity: network" in (run_folder / "run.yaml").read_text()
    assert str(lora_runs) not in (run_folder / "adapter" / "README.md").read_text()
    config = json.loads((run_folder / "adapter" / "adapter_config.json").read_text())
    assert list(config["adapters"]) == ["one", "second"]
    status, out, _ = lamella("evaluate", run_folder, "--json")
    assert status == 0
    assert json.loads(out)["metrics"] == pytest.approx(printed["test"])
    assert lamella("doctor", run_folder)[0] == 0


def check_controls(printed, lora_runs):
    """A LoRA alone, with the head of its own that is for these labels, scores what its own run found."""
    controls = printed["controls"]
    assert list(controls["scores"]) == ["the mean", "one alone", "second alone"]
    assert controls["heads"] == {"the mean": "the composition's", "one alone": "own", "second alone": "own"}
    for control, run in (("one alone", "first"), ("second alone", "second")):
        alone = json.loads((lora_runs / run / "metrics.json").read_text())
        for split in ("validation", "test"):
            assert controls["scores"][control][split] == pytest.approx(alone[split], abs=1e-5)
        difference = printed["test"]["accuracy"] - alone["test"]["accuracy"]
        assert controls["differences"][control]["difference"] == pytest.approx(difference)
    assert (controls["passes"], controls["split"], controls["left_out"]) == (3, "test", 0)


def test_controls_are_shown_beside_the_score(lamella, lora_runs, questions, run_folder):
    loras = (f"a={lora_runs / 'first'}", f"b={lora_runs / 'second'}")

    status, _, err = lamella("compose", "--adapters", *loras, "--task", questions, *FAST, "-o", run_folder)

    assert status == 0, err
    words = " ".join(err.split())
    assert "what it has to beat: accuracy" in words
    assert "By accuracy on test rows the composition" in words
    assert "the mean: with the head that was trained beside the routers" in words
    assert "3 more passes over the rows" in words
    assert set(pd.read_parquet(run_folder / "trace.parquet")["name"]) == {"a", "b"}


def test_compose_check_trains_nothing(lamella, lora_runs, questions, run_folder):
    words = [
        "compose",
        "--adapters",
        lora_runs / "first",
        lora_runs / "second",
        "--task",
        questions,
        *FAST,
        "-o",
        run_folder,
    ]

    status, out, _ = lamella(*words, "--check", "--json")

    assert status == 0
    assert json.loads(out)["estimate"]["steps"] == 4
    assert not run_folder.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapters", "{}/first"], "at least two LoRAs"),
        (["--adapters", "{}/first", "first={}/second"], "Two LoRAs are called 'first'"),
        (["--adapters", "{}/first", "x=nowhere"], "'nowhere' is not a file or folder here"),
        (["--adapters", "{}/first", "x="], "write NAME=PLACE"),
        (["--adapters", "{}/first", "{}/second", "method.topk=1"], "method.topk"),
    ],
)
def test_what_cannot_be_composed_is_status_2(lamella, lora_runs, questions, run_folder, words, message):

    status, out, err = lamella(
        "compose", *(word.format(lora_runs) for word in words), "--task", questions, "-o", run_folder
    )

    assert (status, out) == (2, "")
    assert message in " ".join(err.split())
    assert not run_folder.exists()


def test_help_has_an_example(lamella):
    status, out, _ = lamella("compose", "--help")

    assert status == 0
    assert "Example: lamella compose --adapters" in " ".join(out.split())
