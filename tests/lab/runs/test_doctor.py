"""Doctor on the folder of a run, and the command."""

import json
import shutil

import pandas as pd
import pytest
import typer
import yaml
from safetensors.torch import load_file, save_file
from tests.lab.tiny_runs import MOLA, tiny_settings
from transformers import PreTrainedModel
from typer.testing import CliRunner

from lamella import LamellaError
from lamella.cli.doctor import doctor as command
from lamella.diagnostics.doctor import doctor
from lamella.lab.runs.callbacks import routing_summary
from lamella.lab.runs.checks import diagnose
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.run import train


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy to plant faults in."""
    return shutil.copytree(finished_run(MOLA).folder.path, tmp_path / "run")


def codes(diagnosis):
    return [finding.code for finding in diagnosis.findings]


def assert_healthy(result, monkeypatch):
    """Loaded anew, and on the model that was loaded when it was saved, without loading another."""
    diagnosis = doctor(result.folder.path)
    assert diagnosis.ok, str(diagnosis)
    assert "predicted again" in str(diagnosis)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded again"))
    assert diagnose(result) == diagnosis


def spread(run):
    """The trace with routers that use all their experts, which six steps of training need not have achieved."""
    frame = pd.read_parquet(run / "trace.parquet")
    frame["share"] = 1 / frame["num_experts"]
    frame["entropy"], frame["tokens"] = 0.6, 1000
    return frame


def plant(run, frame):
    """Leaves a trace as the run itself would have."""
    frame.to_parquet(run / "trace.parquet")
    RunFolder(run).finish(RunFolder(run).metrics() | {"routing": routing_summary(frame)})


def test_a_healthy_run_has_no_finding(run):
    plant(run, spread(run))

    diagnosis = doctor(run)

    assert diagnosis.ok, str(diagnosis)
    text = str(diagnosis)
    for examined in ("run: ", "16 validation rows predicted again", "12 of 12 routers judged", "bit by bit"):
        assert examined in text


@pytest.mark.parametrize("method", ["head", "lora", "prompt-tuning", "full"])
def test_runs_without_routers_have_no_finding(finished_run, method, monkeypatch):
    assert_healthy(finished_run(method), monkeypatch)


def test_a_decoder_run_has_no_finding(llama, prose, run_folder, monkeypatch):
    result = train(tiny_settings(llama, prose, {**MOLA, "num_experts": 2}), run_folder)

    assert_healthy(result, monkeypatch)


def test_an_adapter_that_is_not_the_run_s(run):
    """It is whole and fits, but the scores beside it are another model's."""
    plant(run, spread(run))
    path = run / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    head = next(name for name in tensors if name.endswith("classifier.bias"))
    tensors[head] += 0.1 * tensors[head].new_tensor([1.0, -1.0])
    save_file(tensors, path, metadata={"format": "pt"})

    diagnosis = doctor(run)

    assert codes(diagnosis) == ["saved-unequal", "changed-since"]
    assert [finding.where for finding in diagnosis.findings] == [
        "predictions.parquet",
        "adapter/adapter_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("column", "values", "code"),
    [
        ("share", [0.5, 0.3, 0.2, 0.0], "expert-never-fires"),
        ("share", [0.5, 0.3, 0.1, 0.1], "router-collapsed"),  # top-2: half of the selections is every token
        ("entropy", 0.01, "entropy-near-zero"),
        ("effective_experts", 1.04, "one-expert-counts"),
    ],
)
def test_faults_in_the_trace(run, column, values, code):
    frame = spread(run)
    router = (frame["layer"] == 1) & (frame["module"] == "attention.self.key")
    frame.loc[router, column] = values
    if code == "expert-never-fires":
        frame.loc[router, "share"] = [0.4, 0.4, 0.2, 0.0]
    plant(run, frame)

    diagnosis = doctor(run)

    assert codes(diagnosis) == [code]
    assert diagnosis.findings[0].where.startswith("bert.encoder.layer.1.attention.self.key")


def test_a_fault_in_the_adapter_is_found_in_the_run(run):
    path = run / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"topk": 2}))

    assert codes(doctor(run)) == ["config-key-unknown"]


def test_a_task_that_is_gone_is_said(run, tmp_path):
    plant(run, spread(run))
    settings = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump(settings | {"task": f"file:{tmp_path}/gone"}))

    diagnosis = doctor(run)

    assert diagnosis.ok
    assert "predictions: not examined" in str(diagnosis)


def metrics_with(change):
    def edit(run, other):
        metrics = json.loads((run / "metrics.json").read_text())
        change(metrics)
        (run / "metrics.json").write_text(json.dumps(metrics))

    return edit


def settings_with(**values):
    def edit(run, other):
        (run / "run.yaml").write_text(yaml.safe_dump(yaml.safe_load((run / "run.yaml").read_text()) | values))

    return edit


def predictions_with(**columns):
    def edit(run, other):
        pd.read_parquet(run / "predictions.parquet").assign(**columns).to_parquet(run / "predictions.parquet")

    return edit


def another_method_s_adapter(run, other):
    shutil.rmtree(run / "adapter")
    shutil.copytree(other / "adapter", run / "adapter")


EDITED = {
    "a better score": (metrics_with(lambda m: m["test"].update(accuracy=1.0)), "metrics-unlike", "metrics.json"),
    "a better loss": (metrics_with(lambda m: m["validation"].update(loss=0.01)), "metrics-unlike", "metrics.json"),
    "a score less": (metrics_with(lambda m: m["test"].pop("macro_f1")), "metrics-unlike", "metrics.json"),
    "a score of another kind": (metrics_with(lambda m: m.update(test="good")), "metrics-unlike", "metrics.json"),
    "healthier routers": (metrics_with(lambda m: m["routing"].update(entropy=9)), "metrics-unlike", "metrics.json"),
    "no routers": (metrics_with(lambda m: m.update(routing=None)), "metrics-unlike", "trace.parquet"),
    "less time": (metrics_with(lambda m: m.update(train_seconds=0.0)), "changed-since", "metrics.json"),
    "another seed": (metrics_with(lambda m: m.update(seed=7)), "record-differs", "metrics.json"),
    "nothing measured": (lambda run, _: (run / "metrics.json").write_text("{}"), "unreadable", "metrics.json"),
    "no JSON": (lambda run, _: (run / "metrics.json").write_text("{"), "unreadable", "metrics.json"),
    "no predictions": (lambda run, _: (run / "predictions.parquet").unlink(), "unreadable", "predictions.parquet"),
    "all predictions right": (predictions_with(correct=True), "changed-since", "predictions.parquet"),
    "other predictions": (predictions_with(prediction=0, nll=0.5), "metrics-unlike", "predictions.parquet"),
    "no trace": (lambda run, _: (run / "trace.parquet").unlink(), "unreadable", "trace.parquet"),
    "no history": (lambda run, _: (run / "routing.parquet").unlink(), "changed-since", "routing.parquet"),
    "a LoRA's adapter": (another_method_s_adapter, "method-differs", "run.yaml"),
    "no digests of rows": (lambda run, _: (run / "rows.parquet").unlink(), "unreadable", "rows.parquet"),
    "no metrics": (lambda run, _: (run / "metrics.json").unlink(), "changed-since", "metrics.json"),
    "no digests": (lambda run, _: (run / "digests.json").unlink(), "unreadable", "digests.json"),
    "other settings": (settings_with(lr=0.1), "record-differs", "run.yaml"),
    "a tokenizer cut short": (
        lambda run, _: (run / "adapter/tokenizer.json").write_text("{"),
        "changed-since",
        "adapter/tokenizer.json",
    ),
    "broken digests": (lambda run, _: (run / "digests.json").write_text("["), "unreadable", "digests.json"),
}


@pytest.mark.parametrize("case", EDITED)
def test_what_was_changed_after_the_run_is_found(run, finished_run, case):
    plant(run, spread(run))
    edit, code, where = EDITED[case]
    edit(run, finished_run("lora").folder.path)

    found = {finding.code: finding.where for finding in doctor(run).findings if finding.severity == "error"}

    assert where in found[code]


def test_an_unfinished_run_is_refused(run):
    shutil.rmtree(run / "adapter")

    with pytest.raises(LamellaError, match="without a result"):
        doctor(run)


@pytest.fixture
def invoke():
    app = typer.Typer()
    app.command()(command)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_the_command(run, invoke):
    plant(run, spread(run))
    healthy = invoke(run)
    assert healthy.exit_code == 0
    assert "nothing found" in healthy.stdout

    (run / "adapter/adapter_model.bin").write_bytes(b"")
    ill = invoke(run, "--json")
    assert ill.exit_code == 1
    said = json.loads(ill.stdout.splitlines()[-1])
    assert not said["ok"]
    assert said["findings"][0]["code"] == "pickle-weights"
    assert said["checked"]

    assert isinstance(invoke(run / "nowhere").exception, LamellaError)
