"""Every module of the room can be reached by its dotted name, and the steps that give no table need no pandas."""

import importlib
import pkgutil
import sys
from functools import reduce

import pytest
import torch
from tests import tiny_moe

import lamella.similarity
from lamella.errors import LamellaError
from lamella.similarity import Capture, Compressed, capture, compress

MODULES = [one.name for one in pkgutil.walk_packages(lamella.similarity.__path__, "lamella.similarity.")]


@pytest.mark.parametrize("name", MODULES)
def test_no_function_hides_a_module(name):
    module = importlib.import_module(name)
    assert reduce(getattr, name.split(".")[1:], sys.modules["lamella"]) is module


@pytest.mark.parametrize("step", ["capture", "screen", "align", "swap", "compress"])
def test_each_step_is_a_function(step):
    assert callable(getattr(lamella.similarity, step))


def test_capture_compress_and_saving_need_no_pandas(tmp_path, monkeypatch):
    for package in ("pandas", "pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    model = tiny_moe.FAMILIES["qwen2_moe"]()
    taken = capture(model, [tiny_moe.inputs()], tmp_path / "capture", per_expert=8)
    small = compress(model, taken, 0.75, criterion="frequency", scope="layer")
    small.save(tmp_path / "small")
    loaded = Compressed.load(tmp_path / "small").model
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_moe.inputs()).logits, small.model(**tiny_moe.inputs()).logits)
    with pytest.raises(LamellaError, match="routing needs pandas"):
        _ = Capture.load(tmp_path / "capture").routing
