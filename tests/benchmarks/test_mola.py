import platform

import pytest
import torch

from benchmarks.__main__ import run
from benchmarks.encoder import build_batch
from benchmarks.mola import MOLA, MolaSettings, build_models, check_equality
from benchmarks.naive_mola import NaiveMola
from lamella.errors import LamellaError

TINY = MOLA.quick


def test_the_record_says_what_was_measured_and_how(record):
    (case,) = record("mola").cases
    assert [method.name for method in case.methods] == ["frozen", "lora", "mola", "mola balance off", "naive"]
    assert record("mola").clock == "process CPU time"
    assert record("mola").settings["tokens"] == 32
    assert record("mola").settings["dropout"] == 0
    assert all(len(method.seconds) == 2 and method.median_seconds > 0 for method in case.methods)
    assert case.ratio("mola", "lora").minima > 0
    assert {"torch", "peft", "transformers"} <= record("mola").machine["packages"].keys()
    assert platform.node() not in record("mola").model_dump_json()


def test_lora_is_as_large_as_mola(record):
    (case,) = record("mola").cases
    mola, lora = case.method("mola").trainable_parameters, case.method("lora").trainable_parameters
    one_rank = sum(32 + out for out in (32, 32, 32, 32, 128)) + 128 + 32
    assert abs(mola - lora) <= 4 * one_rank / 2
    assert case.method("mola balance off").trainable_parameters == case.method("naive").trainable_parameters == mola
    assert case.method("frozen").trainable_parameters == 0


def test_every_trainable_gradient_was_compared(record):
    (case,) = record("mola").cases
    assert case.equality.tensors == 4 * 6 * 3
    assert 0 <= max(case.equality.output, case.equality.gradient) < 1e-12


def test_the_naive_form_keeps_more_than_lora_and_lora_more_than_the_base(record):
    (case,) = record("mola").cases
    assert case.method("frozen").kept_mb < case.method("lora").kept_mb < case.method("naive").kept_mb


def test_nothing_is_timed_when_the_forms_differ(monkeypatch, capsys):
    right = NaiveMola.forward
    monkeypatch.setattr(NaiveMola, "forward", lambda layer, x: right(layer, x) * 1.001)
    with pytest.raises(LamellaError, match="nothing was timed"):
        run("mola", [], quick=True)
    assert "timing" not in capsys.readouterr().err


def test_a_changed_weight_is_noticed():
    torch.manual_seed(0)
    models = build_models(MolaSettings(**TINY))
    mola, naive = models["mola balance off"].model, models["naive"].model
    layer = next(module for module in naive.modules() if isinstance(module, NaiveMola))
    with torch.no_grad():
        layer.up[0].weight[0, 0] += 1e-4
    with pytest.raises(LamellaError, match="nothing was timed"):
        check_equality(mola, naive, build_batch(32, 32), "cpu")


def test_all_use_the_same_frozen_weights():
    places = [
        {p.data_ptr() for p in one.model.parameters() if not p.requires_grad}
        for one in build_models(MolaSettings(**TINY)).values()
    ]
    assert all(place == places[0] for place in places)


def test_bfloat16_runs():
    assert run("mola", ["dtype=bfloat16"], quick=True).settings["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"hidden": 40}, "hidden=40"),
        ({"tokens": 200}, "tokens=200"),
        ({"layers": 2}, "layers"),
        ({"rounds": 1}, "rounds"),
        ({"dtype": "float16"}, "dtype"),
        ({"round": 5}, "Did you mean 'rounds'"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, culprit):
    with pytest.raises(LamellaError, match=culprit):
        MolaSettings.parse({**TINY, **changes})


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LamellaError, match="device=cuda"):
        MolaSettings.parse({**TINY, "device": "cuda"})
