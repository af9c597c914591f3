"""Whatever is broken in a folder is named: by the doctor as a finding, by all that would use it as an error."""

import hashlib
import json
import shutil

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.lab.tiny_runs import MOLA

from lamella import LamellaError
from lamella.diagnostics.doctor import doctor
from lamella.lab.runs.evaluating import evaluate, trace
from lamella.lab.runs.exporting import export_as_experts, export_collapsed
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.run import train
from lamella.lab.runs.settings import settings_of
from lamella.lab.runs.trained import load_trained
from lamella.version import __version__

WEIGHTS = "adapter/adapter_model.safetensors"
CONFIG = "adapter/adapter_config.json"


@pytest.fixture
def broken(finished_run, tmp_path):
    """A copy of a finished run in which one thing is broken."""

    def copy(method, breaking):
        run = shutil.copytree(finished_run(method).folder.path, tmp_path / "run")
        breaking(run)
        return run

    return copy


def tensors_changed(change, name=WEIGHTS):
    def breaking(run):
        save_file(change(load_file(run / name)), run / name, metadata={"format": "pt"})

    return breaking


def without_a_block(tensors):
    return {name: tensor for name, tensor in tensors.items() if ".layer.1." not in name}


def with_a_hole(tensors):
    first = next(iter(tensors))
    return tensors | {first: torch.full_like(tensors[first], float("nan"))}


def config_changed(**values):
    def breaking(run):
        (run / CONFIG).write_text(json.dumps(json.loads((run / CONFIG).read_text()) | values))

    return breaking


def under_lora_s_type(run):
    config = json.loads((run / CONFIG).read_text())
    kept = ("base_model_name_or_path", "task_type", "r", "target_modules", "lora_alpha")
    (run / CONFIG).write_text(json.dumps({"peft_type": "LORA", **{key: config[key] for key in kept}}))


def cut(name):
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[: (run / name).stat().st_size // 2])


def halved(path):
    lines = path.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith("seed:"))
    path.write_text("\n".join(lines[:end]))


def a_folder_instead(name):
    def breaking(run):
        (run / name).unlink()
        (run / name).mkdir()

    return breaking


def written(name, content):
    return lambda run: (run / name).write_bytes(content)


UNUSABLE = {
    "a block is missing": (MOLA, tensors_changed(without_a_block), "missing"),
    "a block of a LoRA is missing": ("lora", tensors_changed(without_a_block), "missing"),
    "a tensor too many": ("lora", tensors_changed(lambda t: t | {"base_model.model.lora_A": torch.ones(2)}), "lora_A"),
    "another shape": ("lora", tensors_changed(lambda t: {n: x[..., :1].clone() for n, x in t.items()}), "shape"),
    "NaN": ("lora", tensors_changed(with_a_hole), "NaN"),
    "MoLA under LoRA's type": (MOLA, under_lora_s_type, "no place|missing|mola"),
    "LoRA under MoLA's type": ("lora", config_changed(peft_type="LAMELLA_MOLA"), "lora_dropout|bias|unknown|known"),
    "a DoRA without magnitudes": ("lora", config_changed(use_dora=True), "magnitude"),
    "trained tokens that were not saved": ("lora", config_changed(trainable_token_indices=[1, 2]), "token"),
    "an adapter of another method": ("lora", config_changed(peft_type="IA3"), "unknown|known|missing"),
    "weights cut short": (MOLA, cut(WEIGHTS), "adapter_model"),
    "no weights": (MOLA, lambda run: (run / WEIGHTS).unlink(), "adapter_model"),
    "a config cut short": (MOLA, cut(CONFIG), "adapter_config"),
    "a config of another kind": (MOLA, written(CONFIG, b"[1, 2]"), "adapter_config"),
    "a value of another type": (MOLA, config_changed(target_modules=7), "adapter_config"),
    "a config that is no text": (MOLA, written(CONFIG, b"\xff\xfe\x00"), "adapter_config"),
    "a folder in place of weights": (MOLA, a_folder_instead(WEIGHTS), "adapter_model"),
    "a folder in place of a config": (MOLA, a_folder_instead(CONFIG), "adapter_config|neither"),
    "settings that are no YAML": (MOLA, written("run.yaml", b"model: [\n"), "run.yaml"),
    "settings of another kind": (MOLA, written("run.yaml", b"- a list"), "run.yaml"),
    "half of the settings": (MOLA, lambda run: halved(run / "run.yaml"), "run.yaml lacks"),
    "a value that no layer takes": ("lora", config_changed(lora_dropout="(("), "adapter"),
    "no settings at all": (MOLA, written("run.yaml", b""), "run.yaml"),
    "settings of no version": (
        MOLA,
        lambda run: (run / "run.yaml").write_text(
            (run / "run.yaml").read_text().replace(f"lamella_version: {__version__}", "lamella_version: .nan")
        ),
        "lamella_version=nan",
    ),
    "a model without a tensor": (
        "full",
        tensors_changed(lambda t: dict(list(t.items())[:-3]), "model/model.safetensors"),
        "missing",
    ),
    "a model with NaN": ("full", tensors_changed(with_a_hole, "model/model.safetensors"), "NaN"),
    "a model cut short": ("full", cut("model/model.safetensors"), "model"),
    "a model's config cut short": ("full", cut("model/config.json"), "model"),
    "a model's tokenizer cut short": ("full", cut("model/tokenizer.json"), "model"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_broken_is_not_used(broken, case, tmp_path):
    method, breaking, named = UNUSABLE[case]
    run = broken(method, breaking)

    with pytest.raises(LamellaError, match=named):
        load_trained(run)  # what evaluate, trace, evaluate --noise and export --collapse begin with
    if method is MOLA:
        with pytest.raises(LamellaError, match=named):
            export_as_experts(run, tmp_path / "experts")
        assert not (tmp_path / "experts").exists()
    try:
        findings = doctor(run).findings
    except LamellaError:
        return  # nothing can be examined
    assert any(finding.severity == "error" for finding in findings)


@pytest.mark.parametrize("use", [evaluate, trace, lambda run: export_collapsed(run, run / "new")])
def test_every_use_of_a_broken_adapter_is_refused(broken, use):
    run = broken(MOLA, tensors_changed(with_a_hole))

    with pytest.raises(LamellaError, match="NaN"):
        use(run)
    assert not (run / "new").exists()


def with_a_bit_flipped(tensors):
    name = next(name for name in tensors if "lora_B" in name)
    return tensors | {name: tensors[name] + torch.finfo(tensors[name].dtype).eps}


def test_a_changed_adapter_is_not_scored_as_the_run_s(broken, tmp_path):
    run = broken(MOLA, tensors_changed(with_a_bit_flipped))

    for use in (load_trained, lambda run: export_as_experts(run, tmp_path / "experts")):
        with pytest.raises(LamellaError, match=r"safetensors is not as it was written.*copy adapter out"):
            use(run)
    assert not (tmp_path / "experts").exists()
    shutil.move(run / "adapter", tmp_path / "lone")
    assert len(export_as_experts(tmp_path / "lone", tmp_path / "experts").adapters) == 4


@pytest.mark.parametrize("name", ["rows.parquet", "predictions.parquet", "trace.parquet", "metrics.json"])
@pytest.mark.parametrize("change", ["gone", "another run's"])
def test_a_result_that_is_not_as_the_run_left_it_is_not_read(broken, finished_run, name, change):
    def breaking(run):
        (run / name).unlink()
        if change != "gone":
            shutil.copy(finished_run({**MOLA, "top_k": 1}).folder.path / name, run / name)

    run = RunFolder(broken(MOLA, breaking))

    read = run.metrics if name == "metrics.json" else lambda: run.table(name)
    if change != "gone" and name == "rows.parquet":  # of the same rows
        assert len(read()) == 80
        return
    with pytest.raises(LamellaError, match=f"{name} is (missing|not as it was written)"):
        read()


def no_rows_left(name):
    return lambda run: pd.read_parquet(run / name).iloc[:0].to_parquet(run / name)


RECORDS = {
    "no predictions": ("predictions.parquet", no_rows_left("predictions.parquet")),
    "predictions cut short": ("predictions.parquet", cut("predictions.parquet")),
    "a folder in place of predictions": ("predictions.parquet", a_folder_instead("predictions.parquet")),
    "predictions of something else": (
        "predictions.parquet",
        lambda run: shutil.copy(run / "routing.parquet", run / "predictions.parquet"),
    ),
    "an empty trace": ("trace.parquet", no_rows_left("trace.parquet")),
    "a trace cut short": ("trace.parquet", cut("trace.parquet")),
    "a trace of something else": (
        "trace.parquet",
        lambda run: shutil.copy(run / "predictions.parquet", run / "trace.parquet"),
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_broken_record_is_a_finding(broken, case):
    name, breaking = RECORDS[case]

    findings = doctor(broken(MOLA, breaking)).findings

    assert any(name in finding.where and finding.code == "unreadable" for finding in findings), findings


def test_what_a_kill_after_the_end_left_is_removed(broken):
    run = RunFolder(broken("lora", lambda run: (run / "checkpoints" / "checkpoint-6").mkdir(parents=True)))

    with pytest.raises(LamellaError, match="holds a finished run"):
        train(settings_of(run.path), run.path)

    assert not run.checkpoints.exists()


def test_a_run_of_an_edition_with_fewer_settings_is_known_by_those_that_it_wrote(broken):
    """Whatever a later edition adds, to a run or to its method: the digest is of what the file says."""

    def earlier(run):
        tree = yaml.safe_load((run / "run.yaml").read_text())
        del tree["task_temperature"], tree["method"]["mixing_weights"], tree["lamella_version"]
        asked = {key: value for key, value in tree.items() if key not in ("model", "task", "start")}
        former = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        (run / "run.yaml").write_text(yaml.safe_dump(tree | {"lamella_version": "0.2.0.dev0"}))
        RunFolder(run).finish(RunFolder(run).metrics(as_left=False) | {"settings": former})

    run = broken(MOLA, earlier)
    load_trained(run)
    assert settings_of(run).digest_as_written == RunFolder(run).metrics()["settings"] != settings_of(run).digest
    (run / "run.yaml").write_text((run / "run.yaml").read_text().replace("max_length: ", "max_length: 1"))
    with pytest.raises(LamellaError, match="is not as the run had it"):
        load_trained(run)
