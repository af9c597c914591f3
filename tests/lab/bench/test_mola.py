import platform
from pathlib import Path

import pytest
import torch

from lamella.errors import LamellaError
from lamella.lab.bench import BenchResult, MolaSettings, bench_mola, load_result, render_result, write_result
from lamella.lab.bench.arms import build_arms
from lamella.lab.bench.encoder import build_batch
from lamella.lab.bench.mola import check_equality
from lamella.lab.bench.naive import NaiveMola

TINY = {"rounds": 2, "tokens": 32, "hidden": 32, "layers": 4}


@pytest.fixture(scope="module")
def result():
    return bench_mola(MolaSettings(**TINY))


def test_the_record_says_what_was_measured_and_how(result):
    (case,) = result.cases
    assert [arm.name for arm in case.arms] == ["frozen", "lora", "mola", "mola balance off", "naive"]
    assert result.clock == "process CPU time"
    assert result.settings["tokens"] == 32
    assert result.settings["dropout"] == 0
    assert all(len(arm.seconds) == 2 and arm.median_seconds > 0 for arm in case.arms)
    assert case.ratio("mola", "lora").minima > 0
    assert {"torch", "peft", "transformers"} <= result.machine["packages"].keys()


def test_nothing_names_the_host_or_its_folders(result):
    text = result.model_dump_json()
    assert platform.node() not in text
    assert str(Path.cwd()) not in text
    assert str(Path.home()) not in text


def test_lora_is_as_large_as_mola(result):
    (case,) = result.cases
    mola, lora = case.arm("mola").trainable_parameters, case.arm("lora").trainable_parameters
    one_rank = sum(32 + out for out in (32, 32, 32, 32, 128)) + 128 + 32
    assert abs(mola - lora) <= 4 * one_rank / 2
    assert case.arm("mola balance off").trainable_parameters == case.arm("naive").trainable_parameters == mola
    assert case.arm("frozen").trainable_parameters == 0


def test_every_trainable_gradient_was_compared(result):
    (case,) = result.cases
    assert case.equality.tensors == 4 * 6 * 3
    assert 0 <= max(case.equality.output, case.equality.gradient) < 1e-12


def test_the_naive_form_keeps_more_than_lora_and_lora_more_than_the_base(result):
    (case,) = result.cases
    assert case.arm("frozen").kept_mb < case.arm("lora").kept_mb < case.arm("naive").kept_mb


def test_a_record_survives_its_file(result, tmp_path):
    path = tmp_path / "deep" / "bench.json"
    write_result(result, path)
    assert load_result(path) == result
    assert [file.name for file in path.parent.iterdir()] == ["bench.json"]
    assert "| naive |" in render_result(load_result(path))


def test_a_file_that_is_no_record_is_refused(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text('{"bench": "mola"}')
    with pytest.raises(LamellaError, match=r"bench\.json is no record"):
        load_result(path)
    with pytest.raises(LamellaError, match="no record"):
        load_result(tmp_path / "absent.json")


def test_nothing_is_timed_when_the_forms_differ(monkeypatch):
    right = NaiveMola.forward
    monkeypatch.setattr(NaiveMola, "forward", lambda layer, x: right(layer, x) * 1.001)
    started = []
    with pytest.raises(LamellaError, match="nothing was timed"):
        bench_mola(MolaSettings(**TINY), starting=started.append)
    assert not any("timing" in words for words in started)


def test_a_changed_weight_is_noticed():
    torch.manual_seed(0)
    arms = build_arms(MolaSettings(**TINY))
    mola, naive = arms["mola balance off"].model, arms["naive"].model
    layer = next(module for module in naive.modules() if isinstance(module, NaiveMola))
    with torch.no_grad():
        layer.up[0].weight[0, 0] += 1e-4
    with pytest.raises(LamellaError, match="nothing was timed"):
        check_equality(mola, naive, build_batch(32, 32), "cpu")


def test_all_arms_use_the_same_frozen_weights():
    places = [
        {p.data_ptr() for p in arm.model.parameters() if not p.requires_grad}
        for arm in build_arms(MolaSettings(**TINY)).values()
    ]
    assert all(place == places[0] for place in places)


def test_bfloat16_runs():
    result = bench_mola(MolaSettings(**TINY, dtype="bfloat16"))
    assert result.settings["dtype"] == "bfloat16"
    assert isinstance(BenchResult.model_validate(result.model_dump()), BenchResult)


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
