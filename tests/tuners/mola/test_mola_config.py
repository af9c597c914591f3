import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig

from lamella import LamellaError, MolaConfig
from lamella.version import __version__

names = st.text("abcdefgh_.", min_size=1, max_size=8)
several = st.lists(names, min_size=1, max_size=4, unique=True)


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """Any combination of valid settings."""
    explicit = st.integers(4, 9) | st.lists(st.integers(4, 9), min_size=1, max_size=6)
    shapes = st.sampled_from(["rectangle", "triangle", "inverted-triangle", "hourglass", "diamond", "2-4-6-8", "7"])
    is_shape = draw(st.booleans())
    every: dict[str, st.SearchStrategy[Any]] = {
        "r": st.integers(1, 64),
        "lora_alpha": st.integers(1, 64) | st.floats(0.5, 64),
        "lora_dropout": st.floats(0, 0.99),
        "expert_dropout": st.floats(0, 0.99),
        "share_lora_a": st.booleans(),
        "use_rslora": st.booleans(),
        "fan_in_fan_out": st.booleans(),
        "num_experts": shapes if is_shape else explicit,
        "expert_budget": st.none() | st.floats(1, 9) if is_shape else st.none(),
        "top_k": st.integers(1, 4) | st.lists(st.integers(1, 4), min_size=1, max_size=6),
        "router": st.sampled_from(["linear", "cosine"]),
        "mixing_weights": st.sampled_from(["softmax", "equal"]),
        "router_aux_loss_coef": st.floats(0, 1),
        "router_z_loss_coef": st.floats(0, 1),
        "target_modules": st.just("all-linear") | names | several | several.map(set),
        "exclude_modules": st.none() | names | several,
        "modules_to_save": st.none() | several,
        "init_lora_weights": st.booleans() | st.sampled_from(["svd", "goat"]),
        "task_type": st.sampled_from([None, "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"]),
        "inference_mode": st.booleans(),
        "revision": st.none() | names,
        "base_model_name_or_path": st.none() | names,
    }
    layers = st.just({}) | st.fixed_dictionaries(
        {
            "layers_to_transform": st.integers(0, 5) | st.lists(st.integers(0, 5), min_size=1, max_size=3),
            "layers_pattern": st.none() | names | several,
        }
    )
    chosen = draw(st.sets(st.sampled_from(sorted(every))))
    if "expert_budget" in chosen:
        chosen.add("num_experts")
    values = {name: draw(every[name]) for name in sorted(chosen)}
    if isinstance(values.get("init_lora_weights"), str):  # each expert has an A of its own
        values.pop("share_lora_a", None)
    if isinstance(values.get("target_modules"), list | set):  # PEFT allows a choice of layers with a list only
        values.update(draw(layers))
    return values


@settings(max_examples=20, deadline=None)
@given(values=fields())
def test_config_to_json_to_config_is_the_identity(values: dict[str, Any], tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("config")
    config = MolaConfig(**values)
    config.save_pretrained(str(folder))
    again = PeftConfig.from_pretrained(str(folder))
    assert type(again) is MolaConfig
    # What was given is kept: saving alone says that an adapter is for inference.
    assert again.to_dict() == {**config.to_dict(), "inference_mode": again.inference_mode}
    for name, value in values.items():
        if name == "inference_mode":
            continue
        if name in ("target_modules", "exclude_modules") and isinstance(value, list):
            value = set(value)
        assert getattr(again, name) == value, name
    first = (folder / "adapter_config.json").read_text()
    again.save_pretrained(str(folder))
    assert (folder / "adapter_config.json").read_text() == first


def test_the_file_is_sorted_and_names_its_writer(tmp_path: Path) -> None:
    MolaConfig(target_modules={"v", "a", "k"}).save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LAMELLA_MOLA"
    assert written["target_modules"] == ["a", "k", "v"]
    assert written["lamella_version"] == __version__


def test_the_defaults_are_the_documented_ones() -> None:
    config = MolaConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (8, 16, 0.0, False)
    assert (config.num_experts, config.expert_budget, config.top_k) == (4, None, 2)
    assert (config.router, config.router_aux_loss_coef, config.router_z_loss_coef) == ("linear", 1e-3, 0.0)
    assert (config.mixing_weights, config.expert_dropout, config.share_lora_a) == ("softmax", 0.0, False)
    assert (config.target_modules, config.fan_in_fan_out, config.init_lora_weights) == ("all-linear", False, True)
    assert config.scaling == 2.0


def test_an_unknown_key_names_the_nearest_known_one() -> None:
    with pytest.raises(LamellaError, match=r"does not know 'num_expert' \(did you mean 'num_experts'\?\)"):
        MolaConfig(num_expert=4)
    with pytest.raises(LamellaError, match=r"'zzz'") as caught:
        MolaConfig(zzz=1)
    assert "did you mean" not in str(caught.value)


def test_an_unknown_key_in_a_file_names_the_version_that_wrote_it(tmp_path: Path) -> None:
    MolaConfig().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    written = {**json.loads(path.read_text()), "lamella_version": "9.9.9", "expert_choice": True}
    path.write_text(json.dumps(written))
    for load in (PeftConfig.from_pretrained, MolaConfig.from_pretrained):
        with pytest.raises(LamellaError, match=r"'expert_choice'.*lamella 9\.9\.9") as caught:
            load(str(tmp_path))
        assert __version__ in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 2.5}, "r=2.5"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"expert_dropout": 1.0}, "expert_dropout=1.0"),
        ({"router": "sigmoid"}, "router='sigmoid'.*linear.*cosine"),
        ({"mixing_weights": "even"}, "mixing_weights='even'.*softmax.*equal"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef=-1"),
        ({"router_z_loss_coef": -1}, "router_z_loss_coef=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_k": []}, r"top_k=\[\]"),
        ({"top_k": [1, 0]}, r"top_k=\[1, 0\]"),
        ({"top_k": 5, "num_experts": 4}, "top_k=5 is more than num_experts=4"),
        ({"num_experts": 0}, "at least one expert"),
        ({"num_experts": "pyramid"}, "'pyramid' is not a shape"),
        ({"num_experts": [2, 0]}, "at least one expert"),
        ({"num_experts": 4, "expert_budget": 3}, "expert_budget"),
        ({"num_experts": "2-4", "expert_budget": 0.5}, "expert_budget=0.5"),
        ({"lora_dropout": float("nan")}, "lora_dropout=nan"),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef=nan"),
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(LamellaError, match=message):
        MolaConfig(**values)


def test_allocation_gives_experts_top_k_and_notes() -> None:
    assert MolaConfig(num_experts="2-4-6-8", top_k=2).allocation(4) == ([2, 4, 6, 8], [2, 2, 2, 2], [])
    assert MolaConfig(num_experts=[1, 3], top_k=2).allocation(2) == ([1, 3], [1, 2], [])  # one expert has no router
    experts, top_k, notes = MolaConfig(num_experts="2-8", expert_budget=2.5, top_k=2).allocation(2)
    assert (experts, top_k) == ([1, 4], [1, 2])
    assert len(notes) == 1
    assert "block 0" in notes[0]
    with pytest.raises(LamellaError, match=r"top_k=3.*2 experts of block 0.*'2-4'"):
        MolaConfig(num_experts="2-4", top_k=3).allocation(2)
    with pytest.raises(LamellaError, match=r"top_k has 1 entries.*2 blocks"):
        MolaConfig(num_experts=2, top_k=[1]).allocation(2)


def test_a_config_saved_before_there_were_options_means_what_it_meant(tmp_path: Path) -> None:
    MolaConfig(top_k=1).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    options = {"mixing_weights", "expert_dropout", "share_lora_a"}
    written = {key: value for key, value in json.loads(path.read_text()).items() if key not in options}
    path.write_text(json.dumps(written | {"lamella_version": "0.2.0.dev0"}))
    read = PeftConfig.from_pretrained(str(tmp_path))
    assert {key: getattr(read, key) for key in options} == {key: getattr(MolaConfig(), key) for key in options}
