"""What one forward shows of the order and the rows of linear modules, and what MOLE makes of it."""

import copy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tests import tiny
from tests.families.catalogue import FAMILIES
from tests.families.checks import TOLERANCE, _mates, _start, _trained_loras
from tests.families.models import tiny_model

from lamella import MolaConfig, MoleConfig, compose
from lamella.backbones import locate_stacks, rehearse

BY_NAME = {family.name: family for family in FAMILIES}


def linear_modules(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def test_modules_are_seen_in_the_order_in_which_they_run() -> None:
    model = tiny_model(BY_NAME["nomic_bert"])  # its blocks hold their feed-forward before their attention
    stacks, names = locate_stacks(model), linear_modules(model)
    seen = rehearse(model.train(), stacks, names)
    mlp, query = "nomic_bert.layers.0.mlp.gate_proj", "nomic_bert.layers.0.self_attn.q_proj"
    assert names.index(mlp) < names.index(query)
    assert seen.order.index(query) < seen.order.index(mlp)
    assert not seen.other_tokens
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if name in names)


def test_experts_are_given_other_rows() -> None:
    model = tiny_model(BY_NAME["switch_transformers"])
    seen = rehearse(model, locate_stacks(model), linear_modules(model))
    experts = "encoder.block.2.layer.1.mlp.experts.expert_0.wi"
    assert not seen.is_given_sequences(experts)
    assert not seen.is_given_sequences(experts.replace("block.2", "block.0").replace("expert_0", "expert_3"))
    assert seen.is_given_sequences("encoder.block.2.layer.0.SelfAttention.q")


def test_a_module_whose_weight_is_only_read_has_no_experts_and_is_named(tmp_path: Path) -> None:
    family, name = BY_NAME["mamba"], "backbone.layers.1.mixer.dt_proj"
    base = tiny_model(family)
    loras = _trained_loras(family, base, tmp_path)
    config = MolaConfig(target_modules="all-linear", init_lora_weights=False)
    for model in (get_peft_model(copy.deepcopy(base), config), compose(base, loras)):
        skipped = dict(model.base_model.summary().skipped)
        assert "without calling it" in skipped[name]
        assert not any("dt_proj.lamella" in name for name, _ in model.named_parameters())
    assert name in model.peft_config["default"].exclude_modules  # also where nothing can be seen when it is loaded


def test_where_a_model_cannot_be_run_nothing_is_seen() -> None:
    with torch.device("meta"):
        model = tiny.bert()
    seen = rehearse(model, locate_stacks(model), linear_modules(model))
    assert seen.order == ()
    assert seen.sort(["b", "a"]) == ["b", "a"]


@pytest.mark.parametrize("name", ["nomic_bert", "switch_transformers", "swin", "wavlm", "xlnet"])
def test_each_module_has_weights_for_its_own_rows(name: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    base = tiny_model(family)
    assert _start(family, base, "MOLE", tmp_path) <= TOLERANCE  # one-hot is that LoRA
    config = MoleConfig(init_lora_weights=False, balance="none")
    model = compose(base, _trained_loras(family, base, tmp_path), config).eval()
    assert _mates(family, model) <= TOLERANCE
