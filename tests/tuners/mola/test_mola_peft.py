"""What PEFT and transformers promise for an adapter, inside one process."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from tests import tiny
from torch import Tensor, nn

import lamella
from lamella import CannotMergeError, LamellaError, MolaConfig
from lamella.tuners import LamellaType


def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**given).logits  # in training mode, few tokens are computed as many are


def config(**options: object) -> MolaConfig:
    return MolaConfig(**{"r": 2, "num_experts": 3, "init_lora_weights": False, **options})


@pytest.mark.parametrize(
    ("name", "low_cpu_mem_usage", "router"),
    [("bert", False, "linear"), ("gpt2", True, "linear"), ("llama", True, "cosine"), ("t5", False, "cosine")],
)
def test_saved_and_loaded_it_is_bit_equal(name: str, low_cpu_mem_usage: bool, router: str, tmp_path: Path) -> None:
    model = tiny.adapted(tiny.MODELS[name](), num_experts="1-3", top_k=1, router=router)
    given = tiny.inputs(model.get_base_model())
    expected = run(model, given)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    again = PeftModel.from_pretrained(tiny.MODELS[name](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(run(again, given), expected)
    assert not any(p.requires_grad for p in again.parameters())
    assert not any(p.is_meta for p in again.parameters())


def test_a_trainable_load_trains_and_only_the_adapter(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.llama(), router_aux_loss_coef=0.5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True).train()
    again(**tiny.batch(again.get_base_model())).loss.backward()
    actual = tiny.gradients(again)
    assert actual
    assert all("lamella_mola_" in key and gradient.any() for key, gradient in actual.items())
    trainable, total = again.get_nb_trainable_parameters()
    assert trainable == again.base_model.summary().trainable == sum(gradient.numel() for gradient in actual.values())
    assert total > trainable


def test_the_config_is_found_by_its_type(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.llama())
    model.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MolaConfig)
    assert loaded.peft_type == LamellaType.MOLA == "LAMELLA_MOLA"
    assert loaded.inference_mode
    # PEFT writes down which class it was trained on, and that it is saved for inference.
    expected = {**model.peft_config["default"].to_dict(), "inference_mode": True, "auto_mapping": loaded.auto_mapping}
    assert loaded.to_dict() == expected


def test_transformers_own_adapter_methods(tmp_path: Path) -> None:
    model = tiny.llama()
    given = tiny.inputs(model)
    base = run(model, given)
    model.add_adapter(config(), "mixture")
    expected = run(model, given)
    assert not torch.equal(expected, base)
    model.disable_adapters()
    assert torch.equal(run(model, given), base)
    model.enable_adapters()
    assert torch.equal(run(model, given), expected)
    model.save_pretrained(tmp_path)
    again = tiny.llama()
    again.load_adapter(str(tmp_path), "mixture")
    assert torch.equal(run(again, given), expected)
    again.delete_adapter("mixture")
    assert torch.equal(run(again, given), base)


def test_a_model_adapted_by_transformers_trains_with_its_balance_loss() -> None:
    model, clone = tiny.llama(), tiny.llama()
    results = []
    for each, coefficient in ((model, 0.5), (clone, 0.0)):
        torch.manual_seed(0)
        each.add_adapter(config(router_aux_loss_coef=coefficient))
        each.train()(**tiny.batch(each)).loss.backward()
        results.append(tiny.gradients(each, "router"))
    assert all((results[0][key] - results[1][key]).norm() > 1e-3 for key in results[1])


def test_two_adapters_switch_and_leave_no_trace() -> None:
    model = tiny.adapted(tiny.bert())
    given = tiny.inputs(model.get_base_model())
    first = run(model, given)
    model.add_adapter("second", config(num_experts=[1, 2], top_k=1, r=3, target_modules=["query", "value", "dense"]))
    assert torch.equal(run(model, given), first), "adding an adapter must not activate it"
    model.set_adapter("second")
    second = run(model, given)
    assert not torch.allclose(second, first)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".second" in key for key in trainable)
    model.set_adapter("default")
    assert torch.equal(run(model, given), first)
    with model.disable_adapter():
        assert torch.equal(run(model, given), run(tiny.bert(), given))
    assert torch.equal(run(model, given), first)
    model.delete_adapter("second")
    assert not [key for key, _ in model.named_parameters() if "second" in key]
    assert torch.equal(run(model, given), first)


def test_two_adapters_active_together_add_up(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.llama(layers=1).double(), target_modules=["down_proj"]).double()
    model.add_adapter("second", config(num_experts=4, target_modules=["down_proj"]))
    model.double().eval()
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    model.base_model.set_adapter(["default"])
    one = layer(x)
    model.base_model.set_adapter(["second"])
    other = layer(x)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), one + other - layer.base_layer(x))
    model.train()(**tiny.batch(model.get_base_model())).loss.backward()
    assert {key.split(".")[-2] for key in tiny.gradients(model, "lora_A")} == {"default", "second"}


def test_the_second_adapter_is_saved_and_loaded_by_itself(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.llama())
    given = tiny.inputs(model.get_base_model())
    model.add_adapter("second", config(num_experts=4))
    model.set_adapter("second")
    expected = run(model, given)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    again = tiny.adapted(tiny.llama())
    before = run(again, given)
    again.load_adapter(tmp_path / "second", "other")
    assert torch.equal(run(again, given), before)
    again.set_adapter("other")
    assert torch.equal(run(again, given), expected)


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.bert(), task_type="SEQ_CLS")
    assert "classifier.modules_to_save.default.weight" in " ".join(
        key for key, p in model.named_parameters() if p.requires_grad
    )
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(1.0)
    given = tiny.inputs(model.get_base_model())
    expected = run(model, given)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(tiny.bert(seed=0), tmp_path), given), expected)
    custom = tiny.adapted(tiny.llama(), modules_to_save=["lm_head"])
    assert any("lm_head" in key for key in get_peft_model_state_dict(custom))


def adapted_modules(**options: object) -> set[str]:
    model = tiny.adapted(tiny.llama(layers=3), **options).get_base_model()
    return {module.name for module in model.modules() if isinstance(module, tiny.MolaLinear)}


def test_which_modules_are_adapted() -> None:
    every = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    every |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert adapted_modules() == {f"model.layers.{layer}.{name}" for layer in range(3) for name in every}
    left = {name for name in every if "mlp" not in name}
    excluded = adapted_modules(exclude_modules=["gate_proj", "up_proj", "down_proj"])
    assert excluded == {f"model.layers.{layer}.{name}" for layer in range(3) for name in left}
    some = adapted_modules(target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern="layers")
    assert some == {"model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"}
    assert adapted_modules(target_modules=r".*\.1\.mlp\.up_proj") == {"model.layers.1.mlp.up_proj"}


def test_what_is_skipped_is_listed() -> None:
    model = tiny.adapted(tiny.bert())
    skipped = dict(model.base_model.summary().skipped)
    assert "outside the blocks" in skipped["bert.pooler.dense"]
    assert not any("pooler" in key for key in get_peft_model_state_dict(model))
    assert "skipped bert.pooler.dense" in str(model.base_model.summary())


def test_a_module_outside_the_blocks_that_is_named_is_adapted_and_saved(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.bert(), target_modules=["query", "pooler.dense"])
    assert {layer.name for layer in model.modules() if isinstance(layer, tiny.MolaLinear)} == {
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.query",
        "bert.pooler.dense",
    }
    assert "outside the blocks, with 3 experts each: bert.pooler.dense" in str(model.base_model.summary())
    model.save_pretrained(tmp_path)
    batch = tiny.inputs(tiny.bert())
    assert torch.equal(PeftModel.from_pretrained(tiny.bert(), tmp_path)(**batch).logits, model(**batch).logits)


def test_a_model_without_blocks_is_adapted_as_by_lora_and_trains() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    base, x = Plain(), torch.randn(5, 6)
    expected = base(x)
    model = get_peft_model(base, MolaConfig(r=2, target_modules=["up", "down"]))
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    layers = [layer for layer in model.modules() if isinstance(layer, tiny.MolaLinear)]
    assert [layer.name for layer in layers] == ["up", "down"]
    trained = [name for name, gradient in tiny.gradients(model).items() if gradient.abs().sum() > 0]
    assert (
        len([name for name in trained if "lora_B" in name]) == len([name for name in trained if "router" in name]) == 2
    )


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: next(m for m in model.modules() if isinstance(m, tiny.MolaLinear)).merge(),
    ],
)
def test_merging_is_refused_with_the_two_ways_out(merge) -> None:
    model = tiny.adapted(tiny.bert())
    given = tiny.inputs(model.get_base_model())
    expected = run(model, given)
    with pytest.raises(CannotMergeError, match=r"lamella\.collapse.*lamella\.export_experts") as caught:
        merge(model)
    assert isinstance(caught.value, LamellaError)
    assert isinstance(caught.value, NotImplementedError)  # what PEFT's own tuners raise
    assert torch.equal(run(model, given), expected)


def test_unload_gives_the_base_back() -> None:
    base = tiny.t5()
    given = tiny.inputs(base)
    expected, names = run(base, given), dict(base.named_parameters()).keys()
    bare = tiny.adapted(base).unload()
    assert bare is base
    assert torch.equal(run(bare, given), expected)
    assert dict(bare.named_parameters()).keys() == names
    assert not [module for module in bare.modules() if module._forward_pre_hooks or module._forward_hooks]


def test_a_deep_copy_is_independent() -> None:
    model = tiny.adapted(tiny.llama())
    given = tiny.inputs(model.get_base_model())
    expected = run(model, given)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for key, p in clone.named_parameters():
            if "lora_B" in key:
                p.zero_()
    assert torch.equal(run(model, given), expected)
    assert not torch.equal(run(clone, given), expected)


def test_a_row_of_the_batch_cannot_choose_its_adapter() -> None:
    model = tiny.adapted(tiny.llama())
    with pytest.raises(LamellaError, match="different adapter per row"):
        model(**tiny.inputs(model.get_base_model()), adapter_names=["default"] * 3)


def test_the_public_names() -> None:
    assert get_peft_model(tiny.llama(), lamella.MolaConfig()).base_model.summary().experts == {"model.layers": [4, 4]}
    for name in lamella.__all__:
        assert hasattr(lamella, name)
