"""A capture that is killed anywhere goes on to the same end."""

import resource
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from tests.similarity.activations.streams import assert_equal, batches, documents, left_over
from tests.tiny_moe import FAMILIES

from lamella.errors import LamellaError
from lamella.similarity.activations import Capture, Manifest, capture, checkpoints

TEXTS = documents(count=9)


class Killed(BaseException):
    """What no code catches."""


@pytest.fixture(scope="module")
def model():
    return FAMILIES["qwen2_moe"](dtype=torch.float64)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """A checkpoint after every batch."""
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "_SHARE", 0)


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory) -> Capture:
    return capture(model, batches(TEXTS), tmp_path_factory.mktemp("unbroken"), per_expert=5)


def run(model, folder: Path, **settings) -> Capture:
    return capture(model, batches(TEXTS), folder, **{"per_expert": 5, **settings})


def killing(batches, before: int):
    for number, batch in enumerate(batches):
        if number == before:
            raise Killed
        yield batch


@pytest.mark.parametrize("before", range(4))
def test_killed_before_any_batch(model, unbroken, tmp_path, before):
    with pytest.raises(Killed):
        capture(model, killing(batches(TEXTS, size=2), before), tmp_path, per_expert=5)
    if before:
        assert Manifest.read(tmp_path).rows_done == 2 * before
        assert not Capture.load(tmp_path).manifest.complete
    read: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    snapshot = run(model, tmp_path)
    handle.remove()
    assert sum(read) == len(TEXTS) - 2 * before  # nothing is read twice, though the batches are of another size now
    assert snapshot.manifest.rows_done == len(TEXTS)
    for name in ("routing", "coactivation"):
        pd.testing.assert_frame_equal(getattr(snapshot, name), getattr(unbroken, name))
    for at in unbroken.experts:
        assert torch.equal(snapshot.keys(*at), unbroken.keys(*at))
        torch.testing.assert_close(snapshot.inputs(*at), unbroken.inputs(*at))


def every_write(monkeypatch, act: Callable[[int], None]) -> list[int]:
    """``act`` is told the number of every write to disk before it happens."""
    done = [0]

    def watched(function):
        def write(*args, **kwargs):
            act(done[0])
            done[0] += 1
            return function(*args, **kwargs)

        return write

    monkeypatch.setattr(checkpoints, "save_file", watched(checkpoints.save_file))
    monkeypatch.setattr(Manifest, "write", watched(Manifest.write))
    monkeypatch.setattr(checkpoints.shutil, "rmtree", watched(checkpoints.shutil.rmtree))
    return done


def writes_of_a_run(model, folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        done = every_write(patch, lambda number: None)
        run(model, folder)
        return done[0]


def test_killed_at_any_write(model, unbroken, tmp_path):
    total = writes_of_a_run(model, tmp_path / "counted")
    # three checkpoints of three shards and a manifest, two cleared; three shards, a manifest, one cleared
    assert total == 3 * 4 + 2 + 3 + 1 + 1
    for at in range(total):

        def kill(number: int, at: int = at) -> None:
            if number == at:
                raise Killed

        folder = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            every_write(patch, kill)
            with pytest.raises(Killed):
                run(model, folder)
        assert_equal(run(model, folder), unbroken)
        assert left_over(folder) == left_over(unbroken.folder)


def test_killed_again_and_again(model, unbroken, tmp_path):
    for _ in range(30):
        budget = [5]  # writes of this life: one checkpoint, and a little

        def kill(number: int, budget: list[int] = budget) -> None:
            if number >= budget[0]:
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            every_write(patch, kill)
            try:
                run(model, tmp_path)
            except Killed:
                continue
        break
    assert_equal(run(model, tmp_path), unbroken)


def test_what_a_killed_process_could_not_clear_away_goes(model, unbroken, tmp_path):
    for name in (".writing-0123-checkpoint-000000000003", "checkpoint-000000000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "layer-000.safetensors").write_bytes(b"half")
    (tmp_path / ".writing-0123-manifest.json").touch()
    assert_equal(run(model, tmp_path), unbroken)
    assert left_over(tmp_path) == left_over(unbroken.folder)


def test_a_full_disk_leaves_what_was_written(model, unbroken, tmp_path):
    for at in range(writes_of_a_run(model, tmp_path / "counted")):

        def full(number: int, at: int = at) -> None:
            if number == at:
                raise OSError(28, "No space left on device")

        folder = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            every_write(patch, full)
            with pytest.raises(
                LamellaError, match=rf"could not be written to .*{folder.name}: .*No space left.*intact"
            ):
                run(model, folder)
        if (folder / "manifest.json").exists():
            Capture.load(folder)
        assert_equal(run(model, folder), unbroken)


def test_a_file_that_the_system_refuses_to_write(model, unbroken, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(LamellaError, match=r"could not be written .*File too large"):
            run(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_equal(run(model, tmp_path), unbroken)


def test_a_finished_one_is_not_redone(model, unbroken, tmp_path):
    run(model, tmp_path)
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def fail(*args):
        raise AssertionError("the model ran")

    handle = model.register_forward_pre_hook(fail)
    assert_equal(run(model, tmp_path), unbroken)
    handle.remove()
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 3}, "has seed 0, but seed 3"),
        ({"per_expert": 6}, "has per_expert 5, but per_expert 6"),
        ({"dtype": torch.bfloat16}, "has dtype 'float32', but dtype 'bfloat16'"),
        ({"origin": "other text"}, "has origin '', but origin 'other text'"),
    ],
)
def test_a_capture_of_something_else_is_not_gone_on_with(model, tmp_path, other, said, finished):
    begin(model, tmp_path, finished)
    with pytest.raises(LamellaError, match=said):
        run(model, tmp_path, **other)


def begin(model, folder: Path, finished: bool) -> None:
    if finished:
        run(model, folder)
    else:
        with pytest.raises(Killed):
            capture(model, killing(batches(TEXTS), 2), folder, per_expert=5)


@pytest.mark.parametrize("finished", [True, False])
def test_another_model_is_refused_and_both_are_named(model, tmp_path, finished):
    begin(model, tmp_path, finished)
    other = FAMILIES["qwen2_moe"](seed=1, dtype=torch.float64)
    with pytest.raises(LamellaError, match=r"model 'Qwen2MoeForCausalLM .*' is asked for") as error:
        run(other, tmp_path)
    assert Manifest.read(tmp_path).model in str(error.value)


@pytest.mark.parametrize("finished", [True, False])
def test_another_text_is_refused(model, tmp_path, finished):
    begin(model, tmp_path, finished)
    changed = [*TEXTS]
    changed[1] = changed[1].flip(0)
    with pytest.raises(
        LamellaError, match=r"documents of hash -?\d+; the first \d documents given now have hash -?\d+"
    ):
        capture(model, batches(changed), tmp_path, per_expert=5)
    with pytest.raises(LamellaError, match="the text given now ends after 2"):
        capture(model, batches(TEXTS[:2]), tmp_path, per_expert=5)


def test_more_text_after_the_end_is_refused(model, tmp_path):
    run(model, tmp_path)
    with pytest.raises(LamellaError, match="complete with 9 documents, but the text given now goes on"):
        capture(model, batches([*TEXTS, TEXTS[0]]), tmp_path, per_expert=5)


def test_a_lost_or_broken_shard_is_told(model, tmp_path):
    snapshot = run(model, tmp_path)
    shard = snapshot.manifest.shard(tmp_path, 1)
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(LamellaError, match=r"layer-001.safetensors in .* cannot be read"):
        Capture.load(tmp_path)
    shard.unlink()
    with pytest.raises(LamellaError, match=r"layer-001.safetensors in .* cannot be read"):
        run(model, tmp_path)
