"""What PEFT asks of a method works, or is refused by one sentence that names the way, for all three methods."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tests import tiny
from tests.tuners.test_targets import METHODS, build
from transformers import MambaConfig, MambaForCausalLM

from lamella import LamellaError, MolaConfig, MoleConfig, MolexConfig


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_by_each_of_pefts_ways(method: str, folder: Path) -> None:
    model = build(method, folder)
    config = model.peft_config["default"]
    with pytest.raises(LamellaError, match=r"PeftModel already, with the adapter 'default'.*add_adapter.*unload"):
        get_peft_model(model, config)
    with pytest.raises(LamellaError, match=r"add_weighted_adapter.*lamella\.compose"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)
    model.set_adapter("default", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_adapter("default")
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_one_expert_is_converted_to_the_lora_that_it_is(family: str) -> None:
    settings = {"r": 2, "num_experts": 1, "init_lora_weights": False}
    model = get_peft_model(tiny.build(family, layers=2), MolaConfig(**settings)).eval()
    config, tensors = convert_to_lora(model, rank=2)
    config.fan_in_fan_out = family == "gpt2"
    plain = get_peft_model(tiny.build(family, layers=2), config).eval()
    set_peft_model_state_dict(plain, tensors)
    given = tiny.inputs(model.get_base_model())
    expected = model(**given).logits
    torch.testing.assert_close(plain(**given).logits, expected, atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        assert float((model(**given).logits - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("config", [MolaConfig, MolexConfig, MoleConfig])
def test_a_setting_of_peft_s_lora_is_refused_with_the_way(config: type) -> None:
    with pytest.raises(LamellaError, match=r"'trainable_token_indices' \(a setting of PEFT's LoRA.*modules_to_save"):
        config(trainable_token_indices=[1])


@torch.no_grad()
def test_a_lora_beside_a_mixture_on_other_modules() -> None:
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["o_proj"], init_lora_weights=False)).eval()
    given = tiny.inputs(lora.get_base_model())
    expected = lora(**given).logits
    both = get_peft_model(lora.get_base_model(), MolaConfig(r=2, target_modules=["q_proj"]), adapter_name="mixture")
    assert isinstance(both, PeftModel)
    torch.testing.assert_close(both.eval()(**given).logits, expected)


@pytest.mark.parametrize("put", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
def test_a_lora_takes_no_name_that_a_mixture_has(put: Callable[..., object]) -> None:
    """PEFT would replace its config: saved as that LoRA's, the experts would be lost when it is loaded."""
    mixture = tiny.adapted(tiny.llama(), target_modules=["q_proj"])
    base, lora = mixture.get_base_model(), LoraConfig(target_modules=["o_proj"])
    with pytest.raises(LamellaError, match="already has an adapter called 'default', of the type LAMELLA_MOLA"):
        put(base, lora)
    assert isinstance(mixture.peft_config["default"], MolaConfig)
    assert not any("lora_A" in name and "lamella" not in name for name, _ in base.named_parameters())
    put(mixture.unload(), lora)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_trained_head_of_several_layers_stays_when_the_adapter_is_unloaded(method: str, folder: Path) -> None:
    """PEFT copies a weight to what it puts in place, and such a head has none of its own: RoBERTa's, MPNet's."""
    model = build(method, folder, modules_to_save=["pooler"])
    head = model.get_base_model().bert.pooler.modules_to_save["default"]
    assert not hasattr(head, "weight")
    bare = model.unload()
    assert bare.bert.pooler is head
    assert not any("lamella" in name for name, _ in bare.named_parameters())
    bare(**tiny.inputs(bare))


def test_what_peft_refuses_inside_the_blocks_of_molex_is_a_sentence() -> None:
    config = MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=2, state_size=2, time_step_rank=2)
    with pytest.raises(LamellaError, match=r"cannot be put on MambaForCausalLM.*'out_proj' is incompatible"):
        get_peft_model(MambaForCausalLM(config), MolexConfig(lora=LoraConfig(target_modules=["out_proj"])))


def test_a_lora_beside_a_mixture_trains_and_is_saved_by_itself(tmp_path: Path) -> None:
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    config = MolaConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(LamellaError, match="already has an adapter called 'default', of the type LORA"):
        get_peft_model(lora.get_base_model(), config)
    both = get_peft_model(lora.get_base_model(), config, adapter_name="mixture")
    given = tiny.inputs(lora.get_base_model())
    optimizer = torch.optim.SGD([one for one in both.parameters() if one.requires_grad], lr=0.1)
    for _ in range(2):
        both(**given, labels=given["input_ids"]).loss.backward()
        optimizer.step()
    both.save_pretrained(tmp_path, selected_adapters=["mixture"])
    lora.save_pretrained(tmp_path, selected_adapters=["default"])
    base = PeftModel.from_pretrained(tiny.llama(), tmp_path).get_base_model()
    again = PeftModel.from_pretrained(base, tmp_path / "mixture", adapter_name="mixture")
    with torch.no_grad():
        assert torch.equal(again.eval()(**given).logits, both.eval()(**given).logits)
        assert not torch.equal(lora(**given).logits, tiny.llama()(**given).logits)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_no_recording_keeps_the_decision_of_its_example(method: str, folder: Path) -> None:
    model = build(method, folder).eval().requires_grad_(False)
    ids = tiny.inputs(model.get_base_model())["input_ids"]
    with pytest.raises(LamellaError, match=r"torch\.jit\.trace would keep for every input what is decided"):
        torch.jit.trace(model, (ids,))
    if method != "molex":
        exported = torch.export.export(model, (ids,)).module()
        torch.testing.assert_close(exported(ids.flip(1)).logits, model(ids.flip(1)).logits)
        return
    with pytest.raises(LamellaError, match=r"torch\.export would keep the one of the example"):
        torch.export.export(model, (ids,))
