"""Alignment of what a model was really captured doing."""

import pandas as pd
import pytest
import torch
from tests import tiny_moe

from lamella.errors import LamellaError
from lamella.similarity.activations import Capture, capture
from lamella.similarity.alignment import align


def _captured(model, folder):
    batches = [tiny_moe.inputs(batch=8, tokens=12, seed=seed) for seed in range(6)]
    return capture(model, batches, folder, per_expert=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_capture_is_aligned_alike_after_loading(tmp_path, dtype):
    model = tiny_moe.build("qwen2_moe", dtype=dtype)
    first = align(_captured(model, tmp_path), model, aligner="linear", steps=20)
    pd.testing.assert_frame_equal(first, align(Capture.load(tmp_path), model, aligner="linear", steps=20))
    assert (first[first["kind"] == "self"]["nmse"] < 1e-3).all()
    assert set(first["kind"]) == {"pair", "self", "random-target"}


def test_a_capture_of_another_model_is_refused(tmp_path):
    actual = _captured(tiny_moe.build("qwen2_moe"), tmp_path)
    with pytest.raises(LamellaError):
        align(actual, tiny_moe.build("qwen2_moe", seed=1))
