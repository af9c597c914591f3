import getpass
import json
import logging
import math
import resource
import shutil
import socket
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from tests.lab.tiny_runs import MOLA, MOLEX, tiny_settings
from transformers import AutoTokenizer, TrainerCallback

from lamella.errors import LamellaError
from lamella.lab.runs import run as run_module
from lamella.lab.runs.callbacks import entropy_over_training
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.run import train

LEARNED_ALPHA = {**MOLEX, "alpha": 0.7, "alpha_mode": "learned"}
TWO_STEPS = {"max_steps": 2, "evaluate_every": 2}


class KilledError(Exception):
    """Stands for a signal that ends the process."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.steps = []
        self.logs = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("scope", ["shared", "per-layer"])
def test_where_a_learned_alpha_began_and_ended_is_recorded(bert, questions, run_folder, scope):
    metrics = train(
        tiny_settings(bert, questions, {**LEARNED_ALPHA, "alpha_scope": scope}, **TWO_STEPS), run_folder
    ).metrics

    start, end = metrics["alpha"]["start"], metrics["alpha"]["end"]
    assert start.keys() == end.keys()
    assert len(start) == {"shared": 1, "per-layer": 2}[scope]
    assert list(start.values()) == pytest.approx([0.7] * len(start))
    saved = load_file(run_folder / "adapter" / "adapter_model.safetensors")
    logits = [tensor for name, tensor in saved.items() if "molex_alpha" in name]
    assert sorted(end.values()) == pytest.approx(sorted(float(logit.sigmoid()) for logit in logits))
    assert end != start


@pytest.mark.parametrize("method", ["head", "lora", MOLA, MOLEX, "prompt-tuning", "full"])
def test_every_method_leaves_a_whole_folder(finished_run, method):
    result = finished_run(method)
    run_folder = result.folder.path

    name = method if isinstance(method, str) else method["name"]
    files = {path.name for path in run_folder.iterdir()}
    expected = {"run.yaml", "environment.json", "metrics.json", "predictions.parquet", "log.txt"}
    expected |= {"rows.parquet", "digests.json"}
    expected |= {"model" if name == "full" else "adapter"}
    expected |= {"trace.parquet", "routing.parquet"} if name in ("mola", "molex") else set()
    expected |= {"redundancy.parquet"} if name == "mola" else set()
    assert files == expected
    assert result.metrics["saved_equals_loaded"]["equal"]
    assert result.metrics["steps"] == 6
    assert result.metrics["trainable_parameters"] > 0
    assert 0.0 <= result.metrics["test"]["accuracy"] <= 1.0
    assert result.metrics == json.loads((run_folder / "metrics.json").read_text())


def test_training_learns(bert, questions, run_folder):
    result = train(tiny_settings(bert, questions, "full", max_steps=60, evaluate_every=30), run_folder)

    assert result.metrics["test"]["accuracy"] == 1.0


def test_predictions_agree_with_the_metrics(finished_run):
    result = finished_run("lora")

    frame = pd.read_parquet(result.folder.path / "predictions.parquet")
    for split in ("validation", "test"):
        assert frame[frame["split"] == split]["correct"].mean() == result.metrics[split]["accuracy"]
        assert len(frame[frame["split"] == split]) == 16


def test_a_copied_adapter_gives_the_same_predictions(finished_run, questions, tmp_path):
    run_folder = finished_run(MOLA).folder.path
    elsewhere = shutil.copytree(run_folder / "adapter", tmp_path / "elsewhere")

    model = AutoPeftModelForSequenceClassification.from_pretrained(elsewhere, num_labels=2).eval()

    rows = [json.loads(line) for line in (Path(questions[5:]) / "test.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(elsewhere)
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        predictions = model(**inputs).logits.argmax(-1)
    frame = pd.read_parquet(run_folder / "predictions.parquet")
    assert sorted(predictions.tolist()) == sorted(frame[frame["split"] == "test"]["prediction"].tolist())


# six steps as well, and it is killed in the second epoch
TWO_EPOCHS = {"max_steps": None, "epochs": 2, "limit": {"train": 24}}


def _without_times(metrics):
    times = {"build_seconds", "train_seconds", "seconds_per_step", "peak_memory_bytes"}
    return {key: value for key, value in metrics.items() if key not in times}


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory):
    """The run with these settings that nothing interrupted."""
    made = {}

    def of(settings):
        key = settings.model_dump_json()
        if key not in made:
            made[key] = train(settings, tmp_path_factory.mktemp("straight") / "run")
        return made[key]

    return of


@pytest.mark.parametrize(("step", "epochs"), [(4, TWO_EPOCHS), (6, {})])
def test_a_killed_run_goes_on_to_the_same_end(straight_run, bert, questions, tmp_path, step, epochs):
    method = MOLA | {"lora_dropout": 0.2}  # dropout: the random state has to be taken up as well
    settings = tiny_settings(bert, questions, method, evaluate_every=2, **epochs)
    straight = straight_run(settings)

    with pytest.raises(KilledError):
        train(settings, tmp_path / "killed", callbacks=[KillAt(step + 1 if step < 6 else 6)])
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert not (tmp_path / "killed" / "adapter").exists()
    watch = Watch()
    resumed = train(settings, tmp_path / "killed", callbacks=[watch])

    assert watch.steps[0] == (step + 1 if step < 6 else 5)
    assert _without_times(resumed.metrics) == _without_times(straight.metrics)
    ours, theirs = (load_file(run.folder.path / "adapter/adapter_model.safetensors") for run in (straight, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not (tmp_path / "killed" / "checkpoints").exists()
    whole, continued = (pd.read_parquet(run.folder.path / "routing.parquet") for run in (straight, resumed))
    pd.testing.assert_frame_equal(whole, continued)


@pytest.fixture(scope="module")
def interrupted(bert, questions, tmp_path_factory):
    """The settings and the folder of a run that was killed after its second checkpoint, and that which was not."""
    settings = tiny_settings(bert, questions, "lora", evaluate_every=2, keep="last")
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KilledError):
        train(settings, folder / "killed", callbacks=[KillAt(5)])
    return settings, folder / "killed", train(settings, folder / "straight").metrics


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CHECKPOINT_FAULTS = {
    "half a state": lambda checkpoint: (checkpoint / "trainer_state.json").write_text('{"epoch": '),
    "an empty state": lambda checkpoint: (checkpoint / "trainer_state.json").write_text("{}"),
    "no state": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "no optimizer": lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
    "an empty optimizer": lambda checkpoint: torch.save({}, checkpoint / "optimizer.pt"),
    "half an optimizer": lambda checkpoint: cut(checkpoint / "optimizer.pt"),
    "no schedule": lambda checkpoint: (checkpoint / "scheduler.pt").unlink(),
    "no random state": lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
    "half the weights": lambda checkpoint: cut(checkpoint / "adapter_model.safetensors"),
    "no digests": lambda checkpoint: (checkpoint / "digests.json").unlink(),
    "half the digests": lambda checkpoint: cut(checkpoint / "digests.json"),
}


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_a_checkpoint_that_is_not_whole_is_said_and_the_one_before_is_taken(interrupted, run_folder, fault, caplog):
    shutil.copytree(interrupted[1], run_folder)
    CHECKPOINT_FAULTS[fault](run_folder / "checkpoints" / "checkpoint-4")

    taken = RunFolder(run_folder).last_checkpoint()

    assert taken is not None
    assert taken.name == "checkpoint-2"
    assert "checkpoint-4 cannot be gone on from and is removed: checkpoint-4" in caplog.text


def test_from_the_checkpoint_before_a_run_goes_on_to_the_same_end(interrupted, run_folder):
    settings, killed, straight = interrupted
    shutil.copytree(killed, run_folder)
    (run_folder / "checkpoints/checkpoint-4/optimizer.pt").unlink()

    watch = Watch()
    resumed = train(settings, run_folder, callbacks=[watch])

    assert watch.steps[0] == 3
    assert _without_times(resumed.metrics) == _without_times(straight)


def test_without_a_whole_checkpoint_a_run_starts_afresh(interrupted, run_folder):
    settings, killed, straight = interrupted
    shutil.copytree(killed, run_folder)
    for checkpoint in (run_folder / "checkpoints").iterdir():
        (checkpoint / "optimizer.pt").unlink()

    watch = Watch()
    resumed = train(settings, run_folder, callbacks=[watch])

    assert watch.steps[0] == 1
    assert _without_times(resumed.metrics) == _without_times(straight)


def test_the_best_checkpoint_has_to_be_whole_too(bert, questions, run_folder, monkeypatch):
    settings = tiny_settings(bert, questions, "lora", evaluate_every=2)
    with pytest.raises(KilledError):
        train(settings, run_folder, callbacks=[KillAt(5)])
    state = json.loads((run_folder / "checkpoints/checkpoint-4/trainer_state.json").read_text())
    best = run_folder / f"checkpoints/checkpoint-{state['best_global_step']}"
    (best / "adapter_model.safetensors").unlink()

    watch = Watch()
    train(settings, run_folder, callbacks=[watch])

    assert watch.steps[0] == {2: 1, 4: 3}[state["best_global_step"]]


def test_a_gap_in_the_history_is_refused(bert, questions, run_folder):
    settings = tiny_settings(bert, questions, MOLA, evaluate_every=2)
    with pytest.raises(KilledError):
        train(settings, run_folder, callbacks=[KillAt(5)])
    history = pd.read_parquet(run_folder / "routing.parquet")
    history[history["step"] > 2].to_parquet(run_folder / "routing.parquet")

    with pytest.raises(LamellaError, match=r"routing\.parquet lacks step 2"):
        train(settings, run_folder)


class FullDisk(TrainerCallback):
    """From an event on no file can grow beyond a kilobyte."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self.fill)

    def fill(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("event", "step", "said", "goes_on"),
    [
        ("on_step_end", 3, r"checkpoint of step 4 could not be written.*the same command goes on", [3, 4, 5, 6]),
        ("on_train_end", 6, r"predictions\.parquet|adapter", []),
    ],
)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_afterwards(
    interrupted, run_folder, event, step, said, goes_on
):
    settings, _, straight = interrupted
    try:
        with pytest.raises((LamellaError, OSError), match=said):  # the command says either in one sentence
            train(settings, run_folder, callbacks=[FullDisk(event, step)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    watch = Watch()
    resumed = train(settings, run_folder, callbacks=[watch])

    assert watch.steps == goes_on
    assert _without_times(resumed.metrics) == _without_times(straight)


def test_a_folder_that_another_process_writes_is_refused(interrupted, run_folder):
    settings, killed, _ = interrupted
    shutil.copytree(killed, run_folder)
    before = sorted(run_folder.rglob("*"))

    with RunFolder(run_folder).claimed():  # a lock of the kernel's, which ends with whoever holds it
        for force in (False, True):
            with pytest.raises(LamellaError, match="Another process is at work on the run in"):
                train(settings, run_folder, force=force)
    assert sorted(run_folder.rglob("*")) == before


def test_two_that_begin_one_run_do_not_both_write_it(interrupted, run_folder, monkeypatch):
    """The other one comes while this one loads its model, when there is no folder yet."""
    settings = interrupted[0]
    load = run_module.load_backbone
    with ExitStack() as other:

        def loaded(*words):
            other.enter_context(RunFolder(run_folder).claimed())
            return load(*words)

        monkeypatch.setattr(run_module, "load_backbone", loaded)
        with pytest.raises(LamellaError, match="Another process is at work on the run in"):
            train(settings, run_folder)
    assert not (run_folder / "run.yaml").exists()


def test_a_run_killed_after_its_last_step_is_not_trained_again(interrupted, run_folder, monkeypatch):
    settings, _, straight = interrupted
    with monkeypatch.context() as patch:
        patch.setattr("lamella.lab.runs.run.save_trained", lambda *_: (_ for _ in ()).throw(KilledError()))
        with pytest.raises(KilledError):
            train(settings, run_folder)

    watch = Watch()
    resumed = train(settings, run_folder, callbacks=[watch])

    assert watch.steps == []
    assert _without_times(resumed.metrics) == _without_times(straight)
    assert resumed.metrics["train_seconds"] > 0


def test_a_finished_run_is_kept_unless_forced(finished_run, bert, questions, run_folder):
    settings = tiny_settings(bert, questions)
    shutil.copytree(finished_run("lora").folder.path, run_folder)
    before = (run_folder / "metrics.json").read_text()

    with pytest.raises(LamellaError, match="--force"):
        train(settings, run_folder)
    assert (run_folder / "metrics.json").read_text() == before

    other = train(tiny_settings(bert, questions, seed=1, **TWO_STEPS), run_folder, force=True)
    assert other.metrics["seed"] == 1


def test_settings_that_do_not_fit_leave_no_folder(bert, llama, questions, prose, run_folder):
    for settings in (
        tiny_settings(bert, "file:nowhere.jsonl"),
        tiny_settings(str(run_folder / "no-model"), questions),
        tiny_settings(llama, prose, "head"),
        tiny_settings(bert, questions, "lora", router_lr=1e-3),
        tiny_settings(bert, questions, {"name": "mola", "num_experts": "2-4-6-8"}),
        tiny_settings(bert, questions, packing=True),
    ):
        with pytest.raises(LamellaError):
            train(settings, run_folder)
        assert not run_folder.exists()


def test_other_settings_may_follow_a_run_that_kept_nothing(bert, questions, run_folder):
    with pytest.raises(LamellaError, match="step 3"):
        train(tiny_settings(bert, questions, evaluate_every=4), run_folder, callbacks=[Poison()])

    result = train(tiny_settings(bert, questions, evaluate_every=4, lr=1e-3), run_folder)
    assert result.metrics["steps"] == 6


def test_other_settings_do_not_take_up_an_interrupted_run(interrupted, run_folder):
    settings, killed, _ = interrupted
    shutil.copytree(killed, run_folder)

    with pytest.raises(LamellaError, match=r"lr=0\.005.*lr=0\.1"):
        train(settings.model_copy(update={"lr": 0.1}), run_folder)


def test_a_folder_of_something_else_is_left_alone_even_with_force(bert, questions, run_folder):
    run_folder.mkdir()
    (run_folder / "thesis.txt").write_text("years of work")

    for force in (False, True):
        with pytest.raises(LamellaError, match=r"holds no run, but thesis\.txt"):
            train(tiny_settings(bert, questions), run_folder, force=force)
    assert (run_folder / "thesis.txt").read_text() == "years of work"


def test_what_a_killed_process_left_half_written_keeps_nobody_from_a_folder(bert, questions, run_folder):
    run_folder.mkdir()
    (run_folder / ".writing-2a4ddf921f75-run.yaml").write_text("model: ber")  # the first file of a run

    assert train(tiny_settings(bert, questions, **TWO_STEPS), run_folder).metrics["steps"] == 2


class Poison(TrainerCallback):
    """Makes the loss of the third step NaN."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(math.nan)


def test_a_loss_that_is_not_finite_stops_the_run(bert, questions, run_folder):
    with pytest.raises(LamellaError, match=r"step 3 with lr=0\.005.*Lower lr"):
        train(tiny_settings(bert, questions), run_folder, callbacks=[Poison()])

    assert not (run_folder / "metrics.json").exists()
    assert not (run_folder / "adapter").exists()
    assert "The loss became nan" in (run_folder / "log.txt").read_text()


def test_the_logs_tell_how_the_routers_do(bert, questions, run_folder):
    watch, handlers = Watch(), list(logging.getLogger("lamella").handlers)
    settings = tiny_settings(bert, questions, MOLA, report_to=["tensorboard"])
    result = train(settings, run_folder, callbacks=[watch])

    assert logging.getLogger("lamella").handlers == handlers  # that of the run's log is gone
    logged = [log for log in watch.logs if "loss" in log]
    assert len(logged) == 3
    for log in logged:
        assert 0 < log["routing/entropy"] <= math.log(4)
        assert 1 <= log["routing/balance"] <= 4
        assert 0 <= log["routing/dead_experts"] <= 12 * 3
    frame = pd.read_parquet(run_folder / "trace.parquet")
    assert set(frame["num_experts"]) == {2, 4}
    assert result.metrics["routing"]["entropy"] > 0
    history = pd.read_parquet(run_folder / "routing.parquet")
    assert history["step"].unique().tolist() == [2, 4, 6]
    curve = entropy_over_training(history)
    assert curve["step"].tolist() == [2, 4, 6]
    assert curve["entropy"].between(0, 1).all()
    assert curve["balance"].tolist() == pytest.approx([log["routing/balance"] for log in logged])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tracking"))
    events.Reload()
    assert {"train/routing/entropy", "train/routing/balance", "train/loss"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_accumulation_gives_the_steps_of_the_larger_batch(request, tmp_path, kind):
    """A step over twice 4 rows is the step over 8: the same gradient, to its length."""
    common = {"length_sorted": False, "max_grad_norm": 1e9, "log_every": 1, "max_steps": 3, "keep": "last"}
    model, task = ("bert", "questions") if kind == "encoder" else ("llama", "prose")
    model, task = request.getfixturevalue(model), request.getfixturevalue(task)
    one, two = Watch(), Watch()
    whole = train(tiny_settings(model, task, batch_size=8, **common), tmp_path / "whole", callbacks=[one])
    halves = train(
        tiny_settings(model, task, batch_size=4, accumulation=2, **common), tmp_path / "halves", callbacks=[two]
    )

    norms, others = ([log["grad_norm"] for log in watch.logs if "grad_norm" in log] for watch in (one, two))
    assert norms == pytest.approx(others, rel=1e-3)
    ours, theirs = (load_file(run.folder.path / "adapter/adapter_model.safetensors") for run in (whole, halves))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    assert whole.metrics["tokens"] == halves.metrics["tokens"]


def test_bf16_and_checkpointing_train_and_save_equal(bert, questions, run_folder):
    thrifty = {"bf16": True, "gradient_checkpointing": True}
    result = train(tiny_settings(bert, questions, MOLA, **thrifty, **TWO_STEPS), run_folder)

    assert result.metrics["saved_equals_loaded"]["equal"]


def test_checkpointing_changes_nothing(finished_run, bert, questions, run_folder):
    plain = finished_run(MOLA)
    thrifty = train(tiny_settings(bert, questions, MOLA, gradient_checkpointing=True), run_folder)

    ours, theirs = (load_file(run.folder.path / "adapter/adapter_model.safetensors") for run in (plain, thrifty))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_the_best_checkpoint_by_validation_is_kept(bert, questions, run_folder):
    watch = Watch()
    settings = tiny_settings(bert, questions, "full", max_steps=8, evaluate_every=2, lr=3e-3)
    result = train(settings, run_folder, callbacks=[watch])

    scores = [log["eval_accuracy"] for log in watch.logs if "eval_accuracy" in log]
    assert result.metrics["validation"]["accuracy"] == max(scores)
    assert result.metrics["kept_step"] == 2 * (scores.index(max(scores)) + 1)


def test_a_decoder_has_its_perplexity_before_and_after(llama, prose, run_folder):
    result = train(tiny_settings(llama, prose, MOLA, max_steps=20, evaluate_every=10), run_folder)

    before, after = result.metrics["before"]["test"]["perplexity"], result.metrics["test"]["perplexity"]
    assert after < 0.9 * before
    frame = pd.read_parquet(run_folder / "predictions.parquet")
    test = frame[frame["split"] == "test"]
    assert math.exp(test["nll"].sum() / test["tokens"].sum()) == pytest.approx(after)


@pytest.mark.parametrize("method", ["prompt-tuning", "full"])
def test_other_methods_train_a_decoder(llama, prose, run_folder, method):
    result = train(tiny_settings(llama, prose, method, packing=method == "full", **TWO_STEPS), run_folder)

    assert result.metrics["saved_equals_loaded"]["equal"]


def test_a_decoder_has_no_head_to_train(llama, prose, run_folder):
    with pytest.raises(LamellaError, match="has none for the task"):
        train(tiny_settings(llama, prose, "head"), run_folder)


def test_router_lr_without_a_router_is_refused(bert, questions, run_folder):
    with pytest.raises(LamellaError, match="no trainable router"):
        train(tiny_settings(bert, questions, "lora", router_lr=1e-3), run_folder)


def test_routers_with_a_rate_of_0_stay_as_they_began(bert, questions, tmp_path):
    short, long = (
        load_file(
            train(
                tiny_settings(bert, questions, "mola", router_lr=0, max_steps=steps), tmp_path / str(steps)
            ).folder.path
            / "adapter/adapter_model.safetensors"
        )
        for steps in (1, 3)
    )
    routers = {name for name in short if "router" in name}

    assert routers
    assert all(torch.equal(short[name], long[name]) for name in routers)
    assert not all(torch.equal(short[name], long[name]) for name in short.keys() - routers)


def test_the_folder_tells_what_was_run_and_not_who_ran_it(finished_run):
    run_folder = finished_run("lora").folder.path

    settings = yaml.safe_load((run_folder / "run.yaml").read_text())
    assert settings["method"]["r"] == 8
    environment = json.loads((run_folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    text = (run_folder / "environment.json").read_text()
    assert socket.gethostname() not in text
    assert f"/{getpass.getuser()}" not in text


def test_asking_for_sharding_and_not_getting_it_is_an_error(bert, questions, run_folder, monkeypatch):
    monkeypatch.setattr("lamella.lab.runs.trainer.RunTrainer.is_fsdp_enabled", False, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LamellaError, match="FSDP"):
        train(tiny_settings(bert, questions), run_folder)
