import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig

from lamella import LamellaError, MolexConfig

names = st.text("abcdefgh_.", min_size=1, max_size=8)
several = st.lists(names, min_size=1, max_size=4, unique=True)


@st.composite
def loras(draw: st.DrawFn) -> LoraConfig:
    every: dict[str, st.SearchStrategy[Any]] = {
        "r": st.integers(1, 64),
        "lora_alpha": st.integers(1, 64),
        "lora_dropout": st.floats(0, 0.99),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "target_modules": st.just("all-linear") | names | several | several.map(set),
        "exclude_modules": st.none() | names | several,
        "rank_pattern": st.dictionaries(names, st.integers(1, 9), max_size=3),
        "alpha_pattern": st.dictionaries(names, st.integers(1, 9), max_size=3),
        "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(every))))
    return LoraConfig(**{name: draw(every[name]) for name in sorted(chosen)})


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Any combination of valid settings."""
    learned = draw(st.booleans())
    every: dict[str, st.SearchStrategy[Any]] = {
        "alpha": st.floats(0.01, 0.99) if learned else st.floats(0, 1) | st.sampled_from([0, 1]),
        "alpha_mode": st.just("learned" if learned else "fixed"),
        "alpha_scope": st.sampled_from(["shared", "per-layer"]),
        "router_scope": st.sampled_from(["shared", "per-layer"]),
        "score": st.sampled_from(["softmax", "sigmoid"]),
        "top_k": st.integers(1, 2),
        "granularity": st.sampled_from(["sequence", "batch", "token"]),
        "aggregate": st.sampled_from(["mean", "mode"]),
        "candidates": st.sampled_from(["all", "later"]) | st.lists(st.integers(0, 9), min_size=2, unique=True),
        "router_gradient": st.sampled_from(["scale", "straight-through", "none"]),
        "prompt_tokens": st.integers(1, 9),
        "router_aux_loss_coef": st.floats(0, 1),
        "lora": st.none() | loras(),
        "guest_dtype": st.sampled_from([None, "float32", "bfloat16"]),
        "recompute_guest": st.booleans(),
        "seed": st.integers(0, 9),
        "layers_to_transform": st.none() | st.integers(0, 5) | st.lists(st.integers(0, 5), min_size=1, max_size=3),
        "exclude_modules": st.none() | names | several,
        "modules_to_save": st.none() | several,
        "init_lora_weights": st.booleans(),
        "task_type": st.sampled_from([None, "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"]),
        "inference_mode": st.booleans(),
        "revision": st.none() | names,
    }
    chosen = draw(st.sets(st.sampled_from(sorted(every)))) | {"alpha", "alpha_mode"}
    together: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
        [
            {},
            {"policy": "random"},
            {"policy": "uniform"},
            {"policy": "self"},
            {"policy": "fixed", "fixed_layer": 3},
            {"policy": "fixed"},
            {"router": "cosine"},
            {"router": "cosine", "router_proj": 7},
        ]
    )
    return {**{name: draw(every[name]) for name in sorted(chosen)}, **draw(together)}


@settings(max_examples=15, deadline=None)
@given(values=configs())
def test_config_to_json_to_config_is_the_identity(values: dict[str, Any], tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("config")
    config = MolexConfig(**values)
    config.save_pretrained(str(folder))
    again = PeftConfig.from_pretrained(str(folder))
    assert type(again) is MolexConfig
    assert again.to_dict() == {**config.to_dict(), "inference_mode": again.inference_mode}
    for name, value in values.items():
        if name == "inference_mode":
            continue
        expected = set(value) if name == "exclude_modules" and isinstance(value, list) else value
        assert getattr(again, name) == expected, name
    first = (folder / "adapter_config.json").read_text()
    again.save_pretrained(str(folder))
    assert (folder / "adapter_config.json").read_text() == first


def test_the_lora_is_written_as_a_dictionary_with_sorted_lists(tmp_path: Path) -> None:
    MolexConfig(lora=LoraConfig(target_modules={"v", "a", "k"})).save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LAMELLA_MOLEX"
    assert written["lora"]["target_modules"] == ["a", "k", "v"]
    assert written["lora"]["r"] == 8
    assert written["lora"]["peft_type"] == "LORA"


def test_the_defaults_are_the_documented_ones() -> None:
    config = MolexConfig()
    expected = {
        "alpha": 0.95, "alpha_mode": "fixed", "alpha_scope": "shared", "router": "linear", "score": "softmax",
        "router_scope": "shared", "top_k": 1, "granularity": "sequence", "aggregate": "mean", "candidates": "all",
        "router_gradient": "scale", "policy": "learned", "fixed_layer": None, "prompt_tokens": 4,
        "router_aux_loss_coef": 1e-3, "guest_dtype": None, "recompute_guest": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert isinstance(config.lora, LoraConfig)
    assert {field.name for field in fields(MolexConfig)} >= {
        "task_type",
        "inference_mode",
        "modules_to_save",
        "revision",
    }


def test_which_routers_can_be_trained() -> None:
    assert MolexConfig().trains_router
    assert MolexConfig(router_gradient="none").trains_router
    for options in ({"router_gradient": "none", "router_aux_loss_coef": 0}, {"alpha": 1}, {"policy": "random"}):
        assert not MolexConfig(**options).trains_router
    assert MolexConfig(alpha=0).mixes
    assert not MolexConfig(policy="self").mixes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 1.1}, "alpha=1.1"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": True}, "alpha=True"),
        ({"alpha": 0, "alpha_mode": "learned"}, r"alpha=0.*learned alpha.*0\.95"),
        ({"alpha": 1.0, "alpha_mode": "learned"}, r"alpha=1\.0.*logit would be infinite"),
        ({"alpha_mode": "free"}, "alpha_mode='free'.*'learned'"),
        ({"alpha_scope": "layer"}, "alpha_scope='layer'"),
        ({"router": "mlp"}, "router='mlp'.*'cosine'"),
        ({"router_proj": 8}, "router_proj=8.*cosine"),
        ({"router": "cosine", "router_proj": 0}, "router_proj=0"),
        ({"score": "relu"}, "score='relu'"),
        ({"router_scope": "block"}, "router_scope='block'"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": True}, "top_k=True"),
        ({"top_k": 2, "candidates": [3]}, r"top_k=2.*\[3\]"),
        ({"granularity": "word"}, "granularity='word'"),
        ({"aggregate": "max"}, "aggregate='max'"),
        ({"candidates": "earlier"}, "candidates='earlier'.*'later'"),
        ({"candidates": []}, r"candidates=\[\]"),
        ({"candidates": [1, 1]}, r"candidates=\[1, 1\].*once"),
        ({"candidates": [-1, 2]}, r"candidates=\[-1, 2\]"),
        ({"router_gradient": "ste"}, "router_gradient='ste'.*'straight-through'"),
        ({"policy": "best"}, "policy='best'.*'uniform'"),
        ({"fixed_layer": 2}, "fixed_layer=2 has no effect with policy='learned'"),
        ({"policy": "fixed", "fixed_layer": -1}, "fixed_layer=-1"),
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef=-1"),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef=nan"),
        ({"guest_dtype": "float16"}, "guest_dtype='float16'"),
        ({"target_modules": ["query"]}, r"target_modules=.*lora=LoraConfig\(target_modules"),
        ({"layers_pattern": "layers"}, "layers_pattern.*layers_to_transform"),
        ({"lora": 8}, "lora=8 must be a LoraConfig, or None"),
        ({"lora": LoraConfig(task_type="CAUSAL_LM")}, "lora sets task_type.*belong to MolexConfig"),
        ({"lora": LoraConfig(modules_to_save=["head"])}, "lora sets modules_to_save"),
        ({"lora": LoraConfig(layer_replication=[(0, 2)])}, "lora sets layer_replication, which does not work inside"),
        ({"lora": {"layer_replication": [[0, 2], [1, 2]]}}, "lora sets layer_replication, which does not work inside"),
        ({"lora": {"layer_replication": [[0, 2, 3]]}}, "a list, each entry a list of a whole number and a whole num"),
        ({"lora": LoraConfig(bias="all")}, "bias='all'"),
        ({"lora": LoraConfig(init_lora_weights="pissa")}, "'pissa', which changes the base model's weights"),
        ({"lora": {"r": 4, "lora_alhpa": 3}}, r"'lora_alhpa' \(did you mean 'lora_alpha'\?\)"),
        ({"top_kk": 2}, r"'top_kk' \(did you mean 'top_k'\?\)"),
    ],
)
def test_a_value_that_cannot_be_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(LamellaError, match=message):
        MolexConfig(**values)


def test_collections_of_any_kind_are_taken_in_the_lora_inside():
    for some in (["query"], {"query"}, ("query",)):
        MolexConfig(lora=LoraConfig(target_modules=some, exclude_modules=some))


@pytest.mark.parametrize(
    "wrong", [{"target_modules": 3}, {"rank_pattern": None}, {"alpha_pattern": [1]}, {"layers_to_transform": "None"}]
)
def test_wrong_kinds_in_the_lora_inside_are_named(wrong):
    name = next(iter(wrong))
    with pytest.raises(LamellaError, match=f"lora has {name}="):
        MolexConfig(lora=LoraConfig(**wrong))
