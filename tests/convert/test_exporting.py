"""A mixture as plain LoRAs: collapse with a measured error, and the experts one by one."""

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import tiny
from torch import Tensor, nn

import lamella
from lamella import LamellaError
from lamella.routing import find_tracker


def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def batches(model: PeftModel, count: int = 5) -> list[dict[str, Tensor]]:
    return [tiny.inputs(model.get_base_model(), rows=4, tokens=9, seed=seed) for seed in range(count)]


def constant(name: str) -> PeftModel:
    """Every token uses every expert with weight 1/3."""
    model = tiny.adapted(tiny.MODELS[name](), num_experts=3, top_k=3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "router" in key:
                parameter.zero_()
    return model


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("kind", ["one expert", "constant gates"])
def test_where_the_weights_are_constant_collapse_is_exact(name: str, kind: str) -> None:
    model = constant(name) if kind == "constant gates" else tiny.adapted(tiny.MODELS[name](), num_experts=1, top_k=1)
    collapsed = lamella.collapse(model, batches(model))
    assert collapsed.error < 1e-5
    assert max(collapsed.per_module.values()) < 1e-6
    assert isinstance(collapsed.model.peft_config["default"], LoraConfig)
    unseen = tiny.inputs(model.get_base_model(), seed=77)
    torch.testing.assert_close(run(collapsed.model, unseen), run(model, unseen), rtol=1e-4, atol=1e-5)


def effect(model: PeftModel, other: PeftModel, measured: list[dict[str, Tensor]], masked: bool) -> float:
    """The error as its documentation defines it, computed from the outputs alone."""
    lost = whole = 0.0
    for given in measured:
        mixture, plain = run(model, given).double(), run(other, given).double()
        with model.disable_adapter():
            base = run(model, given).double()
        for row in range(len(mixture)):
            real = given["attention_mask"][row].bool() if masked else slice(None)
            lost += float((plain[row] - mixture[row])[real].square().sum())
            whole += float((mixture[row] - base[row])[real].square().sum())
    return math.sqrt(lost / whole)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_reported_error_is_the_error(name: str, count: int, rank: int | None) -> None:
    model = tiny.adapted(tiny.MODELS[name](), num_experts=3, top_k=1, lora_alpha=20)
    given = batches(model, count)
    collapsed = lamella.collapse(model, given, rank=rank)
    assert collapsed.held_out == (count >= 4)
    measured = given[3::4] if count >= 4 else given
    expected = effect(model, collapsed.model, measured, masked=name != "bert")
    assert collapsed.error == pytest.approx(expected, rel=1e-3)
    assert collapsed.error > 0.01, "routed by token, so one LoRA cannot be exact"


def module_error(model: PeftModel, other: PeftModel, name: str, measured: list[dict[str, Tensor]]) -> float:
    """The same for one module's own output, by running the module alone on what the mixture gives it."""
    layer, plain = (each.get_base_model().get_submodule(name) for each in (model, other))
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for given in measured:
        run(model, given)
    hook.remove()
    lost = whole = 0.0
    for x, given in zip(seen, measured, strict=True):
        real = given["attention_mask"].bool()
        with torch.no_grad():
            mixture, collapsed, base = (each(x).double()[real] for each in (layer, plain, layer.base_layer))
        lost += float((collapsed - mixture).square().sum())
        whole += float((mixture - base).square().sum())
    return math.sqrt(lost / whole)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_error_per_module_is_that_modules_error(name: str, rank: int | None) -> None:
    model = tiny.adapted(tiny.MODELS[name](), num_experts=3, top_k=2, lora_alpha=20)
    given = batches(model, 3)
    collapsed = lamella.collapse(model, given, rank=rank)
    layers = {n for n, module in model.get_base_model().named_modules() if isinstance(module, tiny.MolaLinear)}
    assert collapsed.per_module.keys() == layers
    for module, error in collapsed.per_module.items():
        assert error == pytest.approx(module_error(model, collapsed.model, module, given), rel=1e-3), module


def test_the_rank_is_what_was_asked_and_costs_error() -> None:
    model = tiny.adapted(tiny.llama(), num_experts=3, top_k=2, r=2, lora_alpha=20)
    errors = []
    for rank, expected in ((None, 6), (6, 6), (4, 4), (1, 1)):
        collapsed = lamella.collapse(model, batches(model, 3), rank=rank)
        ranks = {len(p) for key, p in collapsed.model.named_parameters() if "lora_A" in key}
        assert ranks == {expected}
        errors.append(sum(collapsed.per_module.values()))
    assert errors[0] == pytest.approx(errors[1])
    assert errors[1] < errors[2] < errors[3]


def test_the_model_given_is_not_changed() -> None:
    model = tiny.adapted(tiny.bert(), task_type="SEQ_CLS", router_aux_loss_coef=0.1).train()
    model.get_base_model().bert.embeddings.eval()  # somebody froze a dropout
    given = batches(model, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    training = {name: module.training for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    collapsed = lamella.collapse(model, given)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {name: module.training for name, module in model.named_modules()} == training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    tracker = find_tracker(model)
    assert tracker is not None
    assert not tracker.observers
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in collapsed.model.parameters()}


def test_the_error_has_nothing_to_do_with_the_heads_state_before_training() -> None:
    model = tiny.adapted(tiny.bert(), task_type="SEQ_CLS")
    given = batches(model, 3)
    error = lamella.collapse(model, given).error
    with torch.no_grad():
        model.get_base_model().classifier.original_module.weight.mul_(100)
    assert lamella.collapse(model, given).error == error


def test_a_collapsed_model_is_saved_and_loaded_as_any_lora(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.bert(), task_type="SEQ_CLS")
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(0.5)
    collapsed = lamella.collapse(model, batches(model, 2)).model
    given = tiny.inputs(model.get_base_model())
    collapsed.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(tiny.bert(), tmp_path), given), run(collapsed, given))
    merged = collapsed.merge_and_unload()
    torch.testing.assert_close(run(merged, given), run(PeftModel.from_pretrained(tiny.bert(), tmp_path), given))


def test_the_error_of_an_encoder_decoder_is_over_the_decoders_positions() -> None:
    model = tiny.adapted(tiny.t5(), num_experts=3, top_k=1, lora_alpha=20)
    # As many decoder positions as encoder positions: the encoder's mask must not be taken for the decoder's.
    given = tiny.inputs(model.get_base_model(), rows=3, tokens=7, pad=4)
    given["decoder_input_ids"] = given["input_ids"].flip(1)
    collapsed = lamella.collapse(model, [given])
    assert collapsed.error == pytest.approx(effect(model, collapsed.model, [given], masked=False), rel=1e-3)


def test_collapse_says_what_it_needs() -> None:
    model = tiny.adapted(tiny.llama())
    with pytest.raises(LamellaError, match="at least one batch"):
        lamella.collapse(model, [])
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(LamellaError, match="MoLA or MOLE adapter"):
        lamella.collapse(lora, batches(lora, 1))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_one_exported_expert_is_the_whole_mixture_of_one(name: str, tmp_path: Path) -> None:
    model = tiny.adapted(tiny.MODELS[name](), num_experts=1, top_k=1)
    given = tiny.inputs(model.get_base_model())
    (folder,) = lamella.export_experts(model, tmp_path)
    again = PeftModel.from_pretrained(tiny.MODELS[name](), folder)
    assert type(again.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(run(again, given), run(model, given))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_exported_experts_weighted_by_the_routers_are_the_mixture(use_rslora: bool, tmp_path: Path) -> None:
    model = tiny.adapted(
        tiny.llama(layers=1), num_experts=3, top_k=2, use_rslora=use_rslora, target_modules=["down_proj"]
    )
    folders = lamella.export_experts(model, tmp_path)
    assert [folder.name for folder in folders] == ["expert_0", "expert_1", "expert_2"]
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    x = torch.randn(4, layer.in_features)
    weights = layer.lamella_mola_router["default"](x, 2).dense_weights()
    base = layer.base_layer(x)
    total = base.clone()
    for expert, folder in enumerate(folders):
        lora = PeftModel.from_pretrained(tiny.llama(layers=1), folder)
        delta = lora.get_base_model().model.layers[0].mlp.down_proj(x) - base
        total += weights[:, expert, None] * delta
    torch.testing.assert_close(layer(x), total)


def test_an_expert_is_exported_from_the_blocks_that_have_it(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.bert(), num_experts=[1, 3], top_k=1, task_type="SEQ_CLS")
    folders = lamella.export_experts(model, tmp_path)
    assert len(folders) == 3
    blocks = []
    for folder in folders:
        lora = PeftModel.from_pretrained(tiny.bert(), folder)
        keys = [key for key, _ in lora.named_parameters() if "lora_A" in key]
        blocks.append({key.split("encoder.layer.")[1][0] for key in keys})
        assert any("classifier.modules_to_save" in key for key, _ in lora.named_parameters())
    assert blocks == [{"0", "1"}, {"1"}, {"1"}]


def test_exported_experts_are_not_overwritten(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.bert())
    lamella.export_experts(model, tmp_path)
    with pytest.raises(LamellaError, match="already holds exported experts"):
        lamella.export_experts(model, tmp_path)


def test_experts_of_rslora_are_exported_with_a_scale_that_every_reader_knows(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.llama(), num_experts=2, top_k=2, r=4, lora_alpha=6, use_rslora=True)
    for path in lamella.export_experts(model, tmp_path):
        config = LoraConfig.from_pretrained(path)
        assert not config.use_rslora
        assert config.lora_alpha / config.r == pytest.approx(6 / math.sqrt(4))
