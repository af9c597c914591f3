"""What PEFT and transformers promise for an adapter, and references to LoRAs that lie elsewhere."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.tuners.mole import trained
from torch import nn

import lamella
from lamella import CannotMergeError, LamellaError, MoleConfig, compose
from lamella.tuners import LamellaType


@pytest.mark.parametrize(
    ("kind", "embed", "low_cpu_mem_usage"),
    [
        ("bert", False, True),
        ("llama", True, False),
        ("gpt2", True, True),
        ("t5", False, False),
        ("distilbert", True, True),
    ],
)
def test_saved_and_loaded_it_is_bit_equal(
    kind: str, embed: bool, low_cpu_mem_usage: bool, folder: Path, tmp_path: Path
) -> None:
    model = trained.composition(kind, folder, double=False, embed_adapters=embed)
    given = tiny.inputs(model.get_base_model())
    expected = trained.run(model, given)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build(kind, layers=2), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(trained.run(again, given), expected)
    assert not any(p.requires_grad for p in again.parameters())
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("mole_loras" in name for name in saved) == embed
    assert any("mole_router" in name for name in saved)


def test_an_embedded_composition_needs_no_lora(folder: Path, tmp_path: Path) -> None:
    here = tmp_path / "loras"
    shutil.copytree(folder, here, dirs_exist_ok=True)
    model = trained.composition("bert", here, double=False, embed_adapters=True, exclude_modules=["pooler.dense"])
    given = tiny.inputs(model.get_base_model())
    expected = trained.run(model, given)
    model.save_pretrained(tmp_path / "out")
    shutil.rmtree(here)
    warnings.filterwarnings("error", message="You have passed exclude_modules")
    again = PeftModel.from_pretrained(tiny.bert(), tmp_path / "out", is_trainable=True)
    assert torch.equal(trained.run(again, given), expected)
    again.save_pretrained(tmp_path / "second")
    third = PeftModel.from_pretrained(tiny.bert(), tmp_path / "second")
    assert torch.equal(trained.run(third, given), expected)


def test_embedded_loras_that_were_not_read_cannot_pass_for_some_that_do_nothing(folder: Path, tmp_path: Path) -> None:
    trained.composition("bert", folder, double=False, embed_adapters=True).save_pretrained(tmp_path)
    model = get_peft_model(tiny.bert(), MoleConfig.from_pretrained(tmp_path)).eval()
    with pytest.raises(
        LamellaError, match=r"LoRAs of adapter 'default' at bert\.encoder.*embed_adapters.*from_pretrained"
    ):
        trained.run(model, tiny.inputs(tiny.bert()))


def test_references_are_relative_and_move_along(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "first/loras", dirs_exist_ok=True)
    model = trained.composition("bert", tmp_path / "first/loras", double=False)
    given = tiny.inputs(model.get_base_model())
    expected = trained.run(model, given)
    model.save_pretrained(tmp_path / "first/out")
    written = json.loads((tmp_path / "first/out/adapter_config.json").read_text())["adapters"]
    assert list(written) == list(trained.NAMES)
    assert written["news"]["source"] == "../loras/bert-news"
    assert len(written["news"]["sha256"]) == 64
    shutil.move(tmp_path / "first", tmp_path / "second")
    again = PeftModel.from_pretrained(tiny.bert(), tmp_path / "second/out")
    assert torch.equal(trained.run(again, given), expected)
    by_transformers = tiny.bert()
    by_transformers.load_adapter(str(tmp_path / "second/out"))
    assert torch.equal(trained.run(by_transformers, given), expected)


def test_a_lora_that_has_moved_is_named_at_load(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "loras", dirs_exist_ok=True)
    model = trained.composition("bert", tmp_path / "loras", double=False)
    given = tiny.inputs(model.get_base_model())
    expected = trained.run(model, given)
    model.save_pretrained(tmp_path / "out")
    shutil.move(tmp_path / "loras/bert-code", tmp_path / "elsewhere")
    with pytest.raises(LamellaError, match="bert-code"):
        PeftModel.from_pretrained(tiny.bert(), tmp_path / "out")
    config = MoleConfig.from_pretrained(tmp_path / "out", adapters={"code": tmp_path / "elsewhere"})
    again = PeftModel.from_pretrained(tiny.bert(), tmp_path / "out", config=config)
    assert torch.equal(trained.run(again, given), expected)
    with pytest.raises(LamellaError, match=r"'maths'.*news, code, law"):
        MoleConfig.from_pretrained(tmp_path / "out", adapters={"maths": tmp_path / "elsewhere"})


def test_a_lora_that_has_changed_is_refused_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "loras", dirs_exist_ok=True)
    model = trained.composition("bert", tmp_path / "loras", double=False)
    model.save_pretrained(tmp_path / "out")
    weights = tmp_path / "loras/bert-code/adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, weights)
    base = tiny.bert()
    for changed in (None, {"code": tmp_path / "loras/bert-code"}):
        config = MoleConfig.from_pretrained(tmp_path / "out", adapters=changed)
        with pytest.raises(LamellaError, match="bert-code has changed since"):
            PeftModel.from_pretrained(base, tmp_path / "out", config=config)
    assert not any("mole" in name for name, _ in base.named_modules())


@settings(max_examples=10, deadline=None)
@drawn(
    settings_=st.fixed_dictionaries(
        {
            "granularity": st.sampled_from(["matrix", "sublayer", "block", "network"]),
            "router_input": st.sampled_from(["mean", "token"]),
            "temperature": st.floats(0.01, 9),
            "learn_temperature": st.booleans(),
            "balance": st.sampled_from(["log", "entropy", "switch", "none"]),
            "router_aux_loss_coef": st.floats(0, 2),
            "prompt_tokens": st.integers(1, 9),
            "top_k": st.sampled_from([None, 1, 3]),
            "embed_adapters": st.booleans(),
            "exclude_modules": st.sampled_from([None, ["value"], ["value", "query"]]),
            "task_type": st.sampled_from([None, "SEQ_CLS"]),
        }
    )
)
def test_the_config_survives_json(
    settings_: dict[str, object], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = MoleConfig(adapters={**trained.loras("bert", folder), "hub": "somebody/poems"}, **settings_)
    path = tmp_path_factory.mktemp("config")
    config.save_pretrained(path)
    again = PeftConfig.from_pretrained(path)
    assert isinstance(again, MoleConfig)
    assert again.peft_type == LamellaType.MOLE == "LAMELLA_MOLE"
    assert again.to_dict() == config.to_dict()
    assert list(again.adapters) == list(config.adapters)
    assert again.references["hub"].source == "somebody/poems"


def test_only_routers_are_saved_and_counted(folder: Path, tmp_path: Path) -> None:
    model = trained.composition("bert", folder, double=False, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.split("lamella_mole_")[-1].split(".")[0] for name in names if "classifier" not in name} == {"router"}
    assert any("classifier" in name for name in names)
    again = PeftModel.from_pretrained(tiny.bert(), tmp_path, is_trainable=True)
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert all("mole_router" in name or "modules_to_save" in name for name in trainable)
    routers = sum(p.numel() for name, p in again.named_parameters() if "mole_router" in name)
    assert again.base_model.summary().trainable == routers > 0


def test_the_summary_says_what_was_composed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained.composition("bert", folder, granularity="sublayer", exclude_modules=["output.dense"])
    routers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.print_trainable_parameters()
    said = capsys.readouterr().out
    for part in (
        "MOLE of 3 LoRAs", "LoRAs by number: 0 news, 1 code, 2 law", f"routers: {routers:,} parameters",
        "5 routers, one for each sublayer", "news: PEFT LoRA of rank 2 on 4 modules",
        "each row of their input decides for itself: bert.pooler.dense",
        "skipped code: bert.encoder.layer.0.output.dense: left out by the config",
    ):  # fmt: skip
        assert part in said, said


def test_a_unit_that_nothing_tells_anything_is_listed(folder: Path) -> None:
    model = trained.composition("bert", folder, exclude_modules=["query", "value"])
    assert "2 routers read nothing" in str(model.base_model.summary())
    given = tiny.inputs(model.get_base_model())
    weights = trained.weights_seen(model, given)["bert.encoder.layer", 0, "block"]
    expected = torch.softmax(trained.routers_of(model)["bert.encoder.layer.0"].bias.detach().double(), dim=0)
    assert torch.allclose(weights, expected.expand_as(weights), atol=0.5)
    assert weights.std(dim=0).max() == 0


def test_transformers_own_adapter_methods(folder: Path, tmp_path: Path) -> None:
    for embed in (False, True):
        model = tiny.llama()
        given = tiny.inputs(model)
        base = trained.run(model, given)
        model.add_adapter(MoleConfig(adapters=trained.loras("llama", folder), embed_adapters=embed), "mixture")
        trained.sharpen(model)
        expected = trained.run(model, given)
        assert not torch.equal(expected, base)
        model.disable_adapters()
        assert torch.equal(trained.run(model, given), base)
        model.enable_adapters()
        model.save_pretrained(tmp_path / str(embed))
        again = tiny.llama()
        again.load_adapter(str(tmp_path / str(embed)), "mixture")
        assert torch.equal(trained.run(again, given), expected)
        again.delete_adapter("mixture")
        assert torch.equal(trained.run(again, given), base)


def test_two_adapters_switch_add_up_and_leave_no_trace(folder: Path) -> None:
    model = trained.composition("bert", folder)
    given = tiny.inputs(model.get_base_model())
    first = trained.run(model, given)
    paths = trained.loras("bert", folder)
    second = MoleConfig(adapters={"a": paths["law"], "b": paths["code"]}, balance="none", granularity="matrix")
    model.add_adapter("second", second)
    assert torch.equal(trained.run(model, given), first), "adding an adapter must not activate it"
    model.set_adapter("second")
    assert not torch.allclose(trained.run(model, given), first)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".second" in name for name in trainable)
    layer = trained.layers_of(model)["bert.encoder.layer.0.attention.self.query"]
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    outputs = {}
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        outputs[len(active), active[0]] = layer(x)
    sum_of_both = outputs[1, "default"] + outputs[1, "second"] - layer.base_layer(x)
    torch.testing.assert_close(outputs[2, "default"], sum_of_both)
    model.set_adapter("default")
    with model.disable_adapter():
        assert torch.equal(trained.run(model, given), trained.run(tiny.bert().double(), given))
    assert torch.equal(trained.run(model, given), first)
    model.delete_adapter("second")
    assert not [name for name, _ in model.named_parameters() if "second" in name]
    assert torch.equal(trained.run(model, given), first)


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: next(iter(trained.layers_of(model).values())).merge(),
    ],
)
def test_merging_is_refused_with_the_way_out(merge, folder: Path) -> None:
    model = trained.composition("bert", folder)
    given = tiny.inputs(model.get_base_model())
    expected = trained.run(model, given)
    with pytest.raises(CannotMergeError, match=r"lamella\.collapse"):
        merge(model)
    assert torch.equal(trained.run(model, given), expected)


def test_unload_gives_the_base_back(folder: Path) -> None:
    base = tiny.t5()
    given = tiny.inputs(base)
    expected, names = trained.run(base, given), dict(base.named_parameters()).keys()
    bare = compose(base, trained.loras("t5", folder)).unload()
    assert bare is base
    assert torch.equal(trained.run(bare, given), expected)
    assert dict(bare.named_parameters()).keys() == names
    assert not [module for module in bare.modules() if module._forward_pre_hooks or module._forward_hooks]


def test_a_deep_copy_is_independent(folder: Path) -> None:
    model = trained.composition("bert", folder)
    given = tiny.inputs(model.get_base_model())
    expected = trained.run(model, given)
    clone = copy.deepcopy(model)
    assert torch.equal(trained.run(clone, given), expected)
    trained.one_hot(clone, 0)
    assert not torch.allclose(trained.run(clone, given), expected)
    assert torch.equal(trained.run(model, given), expected)


def test_a_row_of_the_batch_cannot_choose_its_adapter(folder: Path) -> None:
    model = trained.composition("bert", folder)
    with pytest.raises(LamellaError, match=r"adapter_names.*fixed_weights"):
        model(**tiny.inputs(model.get_base_model()), adapter_names=["default"] * 3)


class Wrapped(nn.Linear):
    """A linear layer that is more than its matrix, as a quantised one is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.0


def test_a_layer_that_is_more_than_its_matrix_is_called_as_it_is(folder: Path) -> None:
    base = tiny.llama()
    for module in list(base.modules()):
        if isinstance(module, nn.Linear):
            module.__class__ = Wrapped
    model = compose(base, trained.loras("llama", folder)).eval()
    plain = compose(tiny.llama(), trained.loras("llama", folder)).eval()
    given = tiny.inputs(tiny.llama())
    torch.testing.assert_close(trained.run(model, given), trained.run(plain, given))


def test_the_public_names() -> None:
    for name in ("MoleConfig", "compose", "masked_experts", "fixed_weights"):
        assert name in lamella.__all__
