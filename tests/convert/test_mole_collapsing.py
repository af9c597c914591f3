"""One plain LoRA in the place of a composition: exact where the weights are constant, its error measured otherwise."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor

import lamella
from lamella import LamellaError, collapse, compose, export_experts, fixed_weights, masked_experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


def batches(kind: str, count: int = 8) -> list[dict[str, Tensor]]:
    model = tiny.build(kind, layers=2)
    return [tiny.inputs(model, rows=6, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("kind", trained.SETTINGS)
@pytest.mark.parametrize("granularity", ["matrix", "block", "network"])
def test_constant_weights_collapse_exactly(kind: str, granularity: str, folder: Path) -> None:
    model = trained.composition(kind, folder, granularity=granularity, sharp=False)
    with torch.no_grad():  # by the bias alone, each unit its own
        for index, router in enumerate(trained.routers_of(model).values()):
            router.bias.copy_(torch.tensor([0.3, -0.2, 0.1 * index]))
    given = batches(kind)
    with lamella.prompt([7] * 6):
        plain = collapse(model, given)
    assert plain.error < 1e-5
    assert max(plain.per_module.values()) < 1e-5
    assert type(plain.model.peft_config["default"]).__name__ == "LoraConfig"
    if kind in ("bert", "distilbert"):
        torch.testing.assert_close(
            trained.run(plain.model, given[0]), trained.run(model, given[0]), rtol=1e-4, atol=1e-6
        )


def test_the_k_best_collapse_exactly_where_they_are_the_same_for_all(folder: Path) -> None:
    model = trained.composition("bert", folder, sharp=False, top_k=2)
    with torch.no_grad():
        for router in trained.routers_of(model).values():
            router.bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
    given = batches("bert")
    plain = collapse(model, given)
    assert plain.error < 1e-5
    torch.testing.assert_close(trained.run(plain.model, given[0]), trained.run(model, given[0]), rtol=1e-4, atol=1e-6)


@settings(max_examples=5, deadline=None)
@drawn(weights=st.lists(st.floats(0, 2), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.1))
def test_fixed_weights_collapse_exactly(weights: list[float], folder: Path) -> None:
    model = trained.composition("bert", folder)
    given = batches("bert")
    with fixed_weights(model, dict(zip(trained.NAMES, weights, strict=True))):
        plain = collapse(model, given)
        expected = trained.run(model, given[0])
    assert plain.error < 1e-6
    torch.testing.assert_close(trained.run(plain.model, given[0]), expected, rtol=1e-5, atol=1e-7)


def test_varying_weights_have_an_error_that_is_measured(folder: Path) -> None:
    model = trained.composition("bert", folder)
    given = batches("bert")
    before = trained.run(model, given[0])
    plain = collapse(model, given)
    assert plain.held_out
    assert 1e-4 < plain.error < 1
    assert torch.equal(trained.run(model, given[0]), before)
    with masked_experts(model, drop=["news", "law"]):  # one LoRA is left, with the weight 1
        assert collapse(model, given).error < 1e-6
    small = collapse(model, given, rank=1)
    assert small.error >= plain.error
    assert small.model.peft_config["default"].r == 1


def test_the_collapsed_lora_is_saved_and_served_by_peft_alone(folder: Path, tmp_path: Path) -> None:
    model = trained.composition("bert", folder, double=False, task_type="SEQ_CLS")
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.mul_(2)
    given = batches("bert")
    plain = collapse(model, given)
    plain.model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.bert(), tmp_path).eval()
    torch.testing.assert_close(trained.run(again, given[0]), trained.run(plain.model, given[0]))


def test_what_no_lora_can_do_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LamellaError, match="form='block-delta' mixes the outputs of whole blocks"):
        collapse(trained.composition("bert", folder, form="block-delta"), batches("bert"))
    with pytest.raises(LamellaError, match=r"lie where its config's adapters say"):
        export_experts(trained.composition("bert", folder), tmp_path)
    with pytest.raises(LamellaError, match="at least one batch"):
        collapse(trained.composition("bert", folder), [])


def test_a_reader_that_takes_the_rank_from_the_tensors_scales_as_peft_does(tmp_path: Path) -> None:
    """llama.cpp divides the config's alpha by a tensor's rank, vLLM by the config's, and neither reads patterns."""
    loras = {}
    for seed, (name, target) in enumerate({"a": "query", "b": "dense"}.items()):
        base = tiny.bert()
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + 3 * seed, lora_alpha=7, target_modules=[target, "value"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(tmp_path / name)
        loras[name] = tmp_path / name
    model = compose(tiny.bert(), loras)
    given = batches("bert")
    with fixed_weights(model, {"a": 0.5, "b": 2}):
        collapse(model, given).model.save_pretrained(tmp_path / "one")
        expected = trained.run(model, given[0])
    config = json.loads((tmp_path / "one/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    plain = tiny.bert()
    tensors = load_file(tmp_path / "one/adapter_model.safetensors")
    for name, A in tensors.items():
        if "lora_A" in name:
            B = tensors[name.replace("lora_A", "lora_B")]
            module = plain.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight.data += config["lora_alpha"] / len(A) * B @ A
    torch.testing.assert_close(trained.run(plain, given[0]), expected, rtol=1e-4, atol=1e-5)
