"""What the configs of all methods share: old keys, defaults of the version that wrote a file, and who wrote it."""

import json
import math
import re
from pathlib import Path

import pytest
from peft import EvaConfig, LoraConfig, PeftConfig

from lamella import LamellaError, MolaConfig, MoleConfig, MolexConfig, __version__
from lamella.tuners import config as shared

CONFIGS = {"mola": MolaConfig, "molex": MolexConfig, "mole": MoleConfig}
OLD = [
    (MolaConfig, "balance_coef", "router_aux_loss_coef", 0.25),
    (MolaConfig, "z_coef", "router_z_loss_coef", 0.25),
    (MolaConfig, "init_weights", "init_lora_weights", False),
    (MolexConfig, "balance_coef", "router_aux_loss_coef", 0.25),
    (MolexConfig, "init_weights", "init_lora_weights", False),
    (MoleConfig, "balance_coef", "router_aux_loss_coef", 0.25),
    (MoleConfig, "init_weights", "init_lora_weights", False),
]


def write(folder: Path, config: PeftConfig, without: tuple[str, ...] = (), **values: object) -> str:
    """A saved config as another version may have written it."""
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    written = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(written | values))
    return str(folder)


@pytest.mark.parametrize(("config", "old", "new", "value"), OLD)
def test_a_constructor_refuses_an_old_key_and_tells_the_new_one(config, old, new, value):
    with pytest.raises(LamellaError, match=f"'{old}' \\(it is called '{new}' now\\)"):
        config(**{old: value})


@pytest.mark.parametrize(("config", "old", "new", "value"), OLD)
@pytest.mark.parametrize("version", [{}, {"lamella_version": "0.1.0"}])
def test_a_saved_config_with_an_old_key_loads(config, old, new, value, version, tmp_path):
    folder = write(tmp_path, config(), without=(new, "lamella_version"), **{old: value}, **version)
    for read in (PeftConfig, config):
        assert getattr(read.from_pretrained(folder), new) == value


def test_a_saved_config_with_both_names_of_a_key_is_refused(tmp_path):
    folder = write(tmp_path, MolaConfig(), balance_coef=0.5)
    with pytest.raises(LamellaError, match="'balance_coef' \\(it is called 'router_aux_loss_coef' now\\)"):
        PeftConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("writer", "top_k"),
    [({}, 1), ({"lamella_version": "0.1.0"}, 1), ({"lamella_version": "0.5"}, 3), ({"lamella_version": "0.7"}, 2)],
)
def test_a_missing_key_takes_the_default_of_the_version_that_wrote_the_config(writer, top_k, tmp_path, monkeypatch):
    former = {
        "0.1.0": {"LAMELLA_MOLA": {"top_k": 1}},
        "0.6": {"LAMELLA_MOLA": {"top_k": 3}, "LAMELLA_MOLEX": {"top_k": 9}},
    }
    monkeypatch.setattr(shared, "FORMER_DEFAULTS", former)
    folder = write(tmp_path / "without", MolaConfig(), without=("top_k", "lamella_version"), **writer)
    assert PeftConfig.from_pretrained(folder).top_k == top_k
    assert PeftConfig.from_pretrained(write(tmp_path / "with", MolaConfig(top_k=4), **writer)).top_k == 4


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_saved_again_is_in_the_words_of_this_version(config, tmp_path):
    folder = write(tmp_path, config(), without=("init_lora_weights",), init_weights=False, lamella_version="0.1.0")
    read = PeftConfig.from_pretrained(folder)
    read.save_pretrained(folder)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["lamella_version"] == __version__
    assert written["init_lora_weights"] is False
    assert "init_weights" not in written
    again = PeftConfig.from_pretrained(folder)
    assert again.to_dict() == read.to_dict()


SHARED = {
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "exclude_modules": {"k_proj", "up_proj"},
    "init_lora_weights": False,
    "revision": "main",
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_method_takes_the_settings_that_peft_s_methods_share(config, tmp_path):
    given = config(**SHARED)
    given.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert {key: getattr(again, key) for key in SHARED} == SHARED
    assert again == given


WRONG_KINDS = [
    ("init_lora_weights", "false", "True or False"),
    ("init_lora_weights", 1, "True or False"),
    ("router_aux_loss_coef", "1e-3", "a number from 0 to 1,000,000"),
    ("router_aux_loss_coef", True, "a number from 0 to 1,000,000"),
    ("router_aux_loss_coef", math.nan, "a number from 0 to 1,000,000"),
    ("router_aux_loss_coef", math.inf, "a number from 0 to 1,000,000"),
    ("top_k", "2", "a whole number from 1 to 1,000,000"),
    ("top_k", 2.0, "a whole number from 1 to 1,000,000"),
    ("layers_to_transform", "0", "a list, each entry a whole number, or a whole number, or None"),
    ("layers_to_transform", ["0"], "a list, each entry a whole number, or a whole number, or None"),
    ("modules_to_save", "score", "a list, each entry a string, or None"),
    ("exclude_modules", 3, "a string, or None"),
    ("layers_pattern", "h", "given together with layers_to_transform"),
    ("inference_mode", "no", "True or False"),
    ("revision", 1, "a string, or None"),
]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("key", "value", "expected"), WRONG_KINDS)
def test_a_value_of_the_wrong_kind_is_named(config, key, value, expected):
    with pytest.raises(LamellaError, match=f"^{re.escape(f'{key}={value!r}')} must be .*{expected}"):
        config(**{key: value})


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (MolaConfig, {"r": "8"}),
        (MolaConfig, {"r": True}),
        (MolaConfig, {"use_rslora": "no"}),
        (MolaConfig, {"lora_alpha": "16"}),
        (MolaConfig, {"num_experts": 2.5}),
        (MolaConfig, {"num_experts": ["2"]}),
        (MolaConfig, {"expert_budget": "3"}),
        (MolaConfig, {"expert_budget": 1e308}),
        (MolaConfig, {"r": 10**9}),
        (MolexConfig, {"recompute_guest": "yes"}),
        (MolexConfig, {"seed": 1.5}),
        (MolexConfig, {"candidates": (0, True)}),
        (MoleConfig, {"learn_temperature": "yes"}),
        (MoleConfig, {"embed_adapters": 1}),
        (MoleConfig, {"adapters": ["a", "b"]}),
        (MoleConfig, {"embedded": {"a": "b"}}),
        (MoleConfig, {"embedded": {"a": [-1]}}),
        (MoleConfig, {"embedded": {"a": [2**63]}}),
    ],
)
def test_and_so_is_one_of_a_method_s_own_settings(config, values):
    (key,) = values
    with pytest.raises(LamellaError, match=f"^{key}=.* must be "):
        config(**values)


def test_what_peft_writes_of_a_lora_is_of_the_kinds_that_it_was():
    """JSON has lists for tuples and sets, and dictionaries for configs."""
    lora = LoraConfig(
        layer_replication=[(0, 2), (1, 2)], target_modules=("q_proj",), layers_to_transform=(0, 1),
        trainable_token_indices={"embed_tokens": [1]}, alora_invocation_tokens=[1, 2], rank_pattern={"q_proj": 2},
        init_lora_weights="eva", eva_config=EvaConfig(), task_type="CAUSAL_LM",
    )  # fmt: skip
    shared.check_lora(lora)
    shared.check_lora(LoraConfig(**json.loads(json.dumps(lora.to_dict(), default=list))))
