"""A training that was stopped goes on as if it had not been."""

import pytest
import torch
from torch import nn

from lamella.errors import LamellaError
from models.diffusion.training import seeded, train
from models.settings import Pace


def line(file, loss=None, **changes):
    torch.manual_seed(3)
    part = nn.Linear(2, 1)

    def squared(generator):
        inputs = torch.randn(8, 2, generator=generator)
        return (part(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()

    values = {"steps": 9, "batch_size": 8, "lr": 0.1, "warmup_steps": 2, "average": 0.5, "keep_every": 2}
    return train(
        part, (lambda generator: loss(squared(generator))) if loss else squared, Pace(**values | changes), file, 0
    )


def stopping_at(step):
    seen = iter(range(step))

    def loss(value):
        if next(seen, None) is None:
            raise KeyboardInterrupt
        return value

    return loss


def test_a_stopped_training_ends_with_the_weights_of_one_that_was_not(tmp_path):
    expected, losses = line(tmp_path / "whole" / "part.safetensors")
    for step in (5, 3):
        with pytest.raises(KeyboardInterrupt):
            line(tmp_path / "part.safetensors", stopping_at(step))
    found, again = line(tmp_path / "part.safetensors")

    assert torch.equal(found.weight, expected.weight)
    assert again == losses
    assert losses[-1] < losses[0]


def test_a_finished_training_is_not_done_again_and_takes_further_steps(tmp_path):
    first, losses = line(tmp_path / "part.safetensors", fall=0)
    again, same = line(tmp_path / "part.safetensors", stopping_at(0), fall=0)
    assert torch.equal(first.weight, again.weight)
    assert same == losses

    longer, more = line(tmp_path / "part.safetensors", fall=0, steps=12)
    assert more[:9] == losses
    assert len(more) == 12
    assert torch.equal(longer.weight, line(tmp_path / "new" / "part.safetensors", fall=0, steps=12)[0].weight)


def test_the_running_mean_is_what_is_kept(tmp_path):
    last, _ = line(tmp_path / "last" / "part.safetensors", average=0.0)
    mean, _ = line(tmp_path / "mean" / "part.safetensors", average=0.9)

    assert not torch.allclose(last.weight, mean.weight, atol=1e-2)


def test_a_loss_that_is_not_finite_says_at_which_step(tmp_path):
    with pytest.raises(LamellaError, match=r"part is not finite at step 0\. Lower part\.pace\.lr"):
        line(tmp_path / "part.safetensors", lambda loss: loss * torch.nan)
    assert not (tmp_path / "part.safetensors").exists()


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "part.safetensors").write_bytes(b"cut short")
    with pytest.raises(LamellaError, match=r"part\.safetensors is not valid safetensors"):
        line(tmp_path / "part.safetensors")


def test_generators_are_decided_by_all_their_facts():
    draws = [
        torch.rand(3, generator=seeded(*facts)).tolist()
        for facts in [(0, "a", 1), (0, "a", 1), (0, "a", 2), (1, "a", 1)]
    ]

    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 3
