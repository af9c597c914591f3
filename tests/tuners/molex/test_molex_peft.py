"""What PEFT and transformers promise for an adapter, inside one process."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from tests import tiny
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import lamella
from lamella import CannotMergeError, LamellaError, MolaConfig, MolexConfig
from lamella.tuners import LamellaType
from lamella.tuners.molex import MolexBlock


def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def config(**options: Any) -> MolexConfig:
    lora = LoraConfig(r=2, target_modules="all-linear")
    return MolexConfig(**{"alpha": 0.5, "lora": lora, "init_lora_weights": False, **options})


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_saved_and_loaded_it_is_bit_equal(name: str, tmp_path: Path) -> None:
    other = {"router_scope": "per-layer", "alpha_mode": "learned", "router": "cosine", "router_proj": 5}
    for options in ({}, other):
        model = tiny.molex(tiny.build(name), **options)
        given = tiny.inputs(model.get_base_model())
        expected = run(model, given)
        folder = tmp_path / str(len(options))
        model.save_pretrained(folder)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
        for low_cpu_mem_usage in (False, True):
            again = PeftModel.from_pretrained(tiny.build(name), folder, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(run(again, given), expected)
            assert not any(p.requires_grad or p.is_meta for p in again.parameters())


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig())
    lora = LoraConfig(r=8, target_modules=["query", "value"])
    adapted = get_peft_model(model, MolexConfig(lora=lora))
    sizes = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(n for name, n in sizes.items() if "lora_" in name) == 294_912
    assert sum(n for name, n in sizes.items() if "molex_router" in name) == 9_228
    assert adapted.base_model.summary().trainable == sum(sizes.values()) == 294_912 + 9_228


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"router_scope": "per-layer"}, 110_736),
        ({"router": "cosine", "router_proj": 96}, 74_977),
        ({"router": "cosine", "router_proj": 416}, 324_897),
        ({"policy": "random"}, 0),
    ],
)
def test_published_router_sizes(options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig())
    adapted = get_peft_model(model, MolexConfig(lora=None, **options))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == count


def test_a_block_is_registered_once() -> None:
    model = tiny.molex(tiny.llama(layers=4))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(list(model.parameters()))
    assert sum("molex_router" in name for name in names) == 2


def test_only_the_adapter_trains_and_all_of_it(tmp_path: Path) -> None:
    model = tiny.molex(tiny.bert(layers=4), router_aux_loss_coef=0.5, alpha_mode="learned")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.bert(layers=4), tmp_path, is_trainable=True)
    for each in (model, again):
        each.train()(**tiny.batch(each.get_base_model())).loss.backward()
        actual = tiny.gradients(each)
        assert all("lora_" in key or "lamella_molex_" in key for key in actual)
        assert all(gradient.any() for gradient in actual.values())
        assert {key for key, p in each.named_parameters() if p.requires_grad} == actual.keys()
        assert each.get_nb_trainable_parameters()[0] == each.base_model.summary().trainable


def test_the_config_is_found_by_its_type(tmp_path: Path) -> None:
    model = tiny.molex(tiny.llama())
    model.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MolexConfig)
    assert loaded.peft_type == LamellaType.MOLEX == "LAMELLA_MOLEX"
    expected = {**model.peft_config["default"].to_dict(), "inference_mode": True, "auto_mapping": loaded.auto_mapping}
    assert loaded.to_dict() == expected
    assert loaded.lora == LoraConfig(r=2, target_modules="all-linear"), "PEFT must not write into the user's own config"


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_transformers_own_adapter_methods(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    given = tiny.inputs(model)
    base = run(model, given)
    model.add_adapter(config(), "mixture")
    tiny.sharpen(model)
    expected = run(model, given)
    assert not torch.allclose(expected, base)
    model.disable_adapters()
    assert torch.equal(run(model, given), base)
    model.enable_adapters()
    assert torch.equal(run(model, given), expected)
    model.save_pretrained(tmp_path)
    again = tiny.build(name)
    info = again.load_adapter(str(tmp_path), "mixture")
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert torch.equal(run(again, given), expected)
    again.delete_adapter("mixture")
    assert torch.equal(run(again, given), base)


def test_mola_is_still_loaded_by_transformers(tmp_path: Path) -> None:
    model = tiny.llama()
    model.add_adapter(MolaConfig(r=2, num_experts=2, top_k=1, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again = tiny.llama()
    assert not again.load_adapter(str(tmp_path)).missing_keys
    given = tiny.inputs(model)
    assert torch.equal(run(again, given), run(model, given))


def test_two_adapters_switch_and_leave_no_trace() -> None:
    model = tiny.molex(tiny.bert(layers=4))
    given = tiny.inputs(model.get_base_model())
    first = run(model, given)
    lora = LoraConfig(r=3, target_modules=["query", "value"])
    model.add_adapter("second", config(layers_to_transform=[1, 3], top_k=2, router_scope="per-layer", lora=lora))
    assert torch.equal(run(model, given), first), "adding an adapter must not activate it"
    assert all(".default" in key for key, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("second")
    second = run(model, given)
    assert not torch.allclose(second, first)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert {key.split(".")[-2] for key in trainable} == {"second"}
    assert sum("lora_A" in key for key in trainable) == 8
    alone = tiny.molex(tiny.bert(layers=4), layers_to_transform=[1, 3], top_k=2, router_scope="per-layer", lora=lora)
    assert {name.replace("default", "second") for name, p in alone.named_parameters() if p.requires_grad} == {
        name.replace("layer.0.base_layer", "layer.0").replace("layer.2.base_layer", "layer.2") for name in trainable
    }
    model.set_adapter("default")
    assert torch.equal(run(model, given), first)
    with model.disable_adapter():
        assert torch.equal(run(model, given), run(tiny.bert(layers=4), given))
    model.delete_adapter("second")
    assert not [key for key, _ in model.named_parameters() if "second" in key]
    assert not [block for block in tiny.blocks(model) if "second" in block.mixtures]
    assert torch.equal(run(model, given), first)
    assert model.base_model.set_adapter("default") is None
    with pytest.raises(LamellaError, match="one adapter at a time"):
        model.base_model.set_adapter(["default", "other"])


def test_the_second_adapter_is_saved_and_loaded_by_itself(tmp_path: Path) -> None:
    model = tiny.molex(tiny.llama(layers=4))
    given = tiny.inputs(model.get_base_model())
    model.add_adapter("second", config(top_k=2))
    model.set_adapter("second")
    expected = run(model, given)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    again = tiny.molex(tiny.llama(layers=4))
    before = run(again, given)
    again.load_adapter(tmp_path / "second", "other")
    assert torch.equal(run(again, given), before)
    again.set_adapter("other")
    assert torch.equal(run(again, given), expected)


def test_two_adapters_active_in_the_layers_are_refused() -> None:
    model = tiny.molex(tiny.bert(layers=4))
    model.add_adapter("second", config())
    for layer in model.modules():
        if isinstance(layer, MolexBlock | LoraLayer):
            layer.set_adapter(["default", "second"])
    with pytest.raises(LamellaError, match=r"2 MoLEx adapters are active.*default, second"):
        run(model, tiny.inputs(model.get_base_model()))


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny.molex(tiny.bert(layers=4), task_type="SEQ_CLS")
    assert any("classifier.modules_to_save" in key for key, p in model.named_parameters() if p.requires_grad)
    assert not any("classifier" in name and "lora" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(1.0)
    given = tiny.inputs(model.get_base_model())
    expected = run(model, given)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(tiny.bert(layers=4), tmp_path), given), expected)
    custom = tiny.molex(tiny.llama(), modules_to_save=["lm_head"])
    assert any("lm_head" in key for key in get_peft_model_state_dict(custom))


def test_without_lora_the_base_is_frozen_all_the_same() -> None:
    model = tiny.molex(tiny.bert(layers=4), lora=None)
    assert {key.split(".")[-3] for key, p in model.named_parameters() if p.requires_grad} == {"lamella_molex_router"}
    assert not [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def test_no_lora_named_is_pefts_usual_one() -> None:
    model = get_peft_model(tiny.llama(), MolexConfig())
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize("merge", [lambda m: m.merge_and_unload(), lambda m: m.merge_adapter()])
def test_merging_is_refused(merge) -> None:
    model = tiny.molex(tiny.bert())
    given = tiny.inputs(model.get_base_model())
    expected = run(model, given)
    with pytest.raises(CannotMergeError, match=r"MoLEx.*no single weight.*policy='self'"):
        merge(model)
    with pytest.raises(CannotMergeError):
        tiny.blocks(model)[0].merge()
    assert torch.equal(run(model, given), expected)


def test_collapse_and_export_refuse_it_by_name(tmp_path: Path) -> None:
    model = tiny.molex(tiny.bert())
    with pytest.raises(LamellaError, match=r"MoLEx.*policy='self'"):
        lamella.collapse(model, [tiny.inputs(model.get_base_model())])
    with pytest.raises(LamellaError, match=r"MoLEx.*policy='self'"):
        lamella.export_experts(model, tmp_path / "experts")


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_unload_gives_the_base_back_without_its_lora(name: str) -> None:
    base = tiny.build(name)
    given = tiny.inputs(base)
    expected, names = run(base, given), dict(base.named_parameters()).keys()
    adapted = tiny.molex(base)
    adapted.add_adapter("second", config())
    bare = adapted.unload()
    assert bare is base
    assert torch.equal(run(bare, given), expected)
    assert dict(bare.named_parameters()).keys() == names
    assert not [module for module in bare.modules() if isinstance(module, MolexBlock | LoraLayer)]
    assert not [module for module in bare.modules() if module._forward_pre_hooks or module._forward_hooks]
    assert "generate" not in bare.__dict__


def test_a_deep_copy_is_independent() -> None:
    model = tiny.molex(tiny.llama(layers=4))
    given = tiny.inputs(model.get_base_model())
    expected, said = run(model, given), model.generate(**given, max_new_tokens=3, do_sample=False)
    clone = copy.deepcopy(model)
    theirs = {id(module) for module in clone.modules()}
    for block in tiny.blocks(clone):
        assert all(id(other) in theirs for other in [*block.blocks, *block.routers.values()])
    assert clone.get_base_model().generate.model is clone.get_base_model()
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(run(model, given), expected)
    assert torch.equal(model.generate(**given, max_new_tokens=3, do_sample=False), said)
    assert not torch.equal(run(clone, given), expected)


def test_a_row_of_the_batch_cannot_choose_its_adapter() -> None:
    model = tiny.molex(tiny.llama())
    with pytest.raises(LamellaError, match="different adapter per row"):
        model(**tiny.inputs(model.get_base_model()), adapter_names=["default"] * 3)


def test_which_blocks_mix_and_what_the_summary_says(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.molex(tiny.build("gemma2", layers=6), candidates="later", exclude_modules=["layers.1"])
    summary = model.base_model.summary()
    assert [block.place.layer for block in tiny.blocks(model)] == [0, 2, 3, 4, 5]
    assert [block.routed("default") for block in tiny.blocks(model)] == [True, False, False, False, False]
    assert summary.experts == {"model.layers": [2, 0, 1, 1, 0, 0]}
    assert summary.modules == {"model.layers": [7] * 6}
    model.print_trainable_parameters()
    said = capsys.readouterr().out
    assert "skipped model.layers.1: named in exclude_modules" in said
    assert "blocks 0 choose among 2, 4" in said
    assert "block 5 of model.layers runs without a guest: no block of its kind is later" in said
    some = tiny.molex(tiny.t5(layers=3), layers_to_transform=[0, 2], layers_pattern="decoder.block")
    assert [block.name for block in tiny.blocks(some)] == ["decoder.block.0", "decoder.block.2"]
    assert [block.mixtures["default"].depth.candidates for block in tiny.blocks(some)] == [(0, 1, 2)] * 2


def test_the_public_names() -> None:
    assert lamella.MolexConfig is MolexConfig
    for name in lamella.__all__:
        assert hasattr(lamella, name)


@pytest.mark.parametrize("autocast", [True, False])
def test_router_and_alpha_have_the_precision_that_peft_gives_adapters(autocast):
    config = MolexConfig(alpha_mode="learned", router="cosine", lora=LoraConfig(target_modules=["q_proj"]))
    model = get_peft_model(tiny.llama().to(torch.bfloat16), config, autocast_adapter_dtype=autocast)

    kinds = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()

    assert kinds == {torch.float32 if autocast else torch.bfloat16}
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
