"""What the configs of all methods share: old keys, defaults of the version that wrote a file, and who wrote it."""

import json
from pathlib import Path

import pytest
from peft import PeftConfig

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
