"""Weights that accelerate keeps elsewhere, before or after an adapter is put on: the same numbers, or a refusal."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel, get_peft_model_state_dict
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lamella
from lamella import LamellaError

CPU = torch.device("cpu")


ADAPTERS: dict[str, Callable[[LlamaForCausalLM, Path], PeftModel]] = {
    "mola": lambda base, _: tiny.adapted(base, router_aux_loss_coef=0.1),
    "mola sorted": lambda base, _: tiny.adapted(base, num_experts=40, r=8, router="cosine"),
    "molex": lambda base, _: tiny.molex(base, alpha_mode="learned"),
    "mole": lambda base, folder: trained.composed(base, "llama", folder, embed_adapters=True),
    "mole token": lambda base, folder: trained.composed(
        base, "llama", folder, router_input="token", granularity="sublayer"
    ),
    "mole blocks": lambda base, folder: trained.composed(
        base, "llama", folder, granularity="block", form="block-delta"
    ),
}


def on_disk(model: nn.Module, folder: Path) -> None:
    """Every second module with weights lies on disk, so that siblings lie in different places."""
    own = [name for name, module in model.named_modules() if {**module._parameters, **module._buffers}]
    places = {name: ("cpu", "disk")[number % 2] for number, name in enumerate(own)}
    dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def in_memory(model: nn.Module, folder: Path) -> None:
    cpu_offload(model, execution_device=CPU, offload_buffers=True)


def batch() -> dict[str, Tensor]:
    given = tiny.batch(tiny.llama())
    given["labels"][:, :2] = -100
    return given


def said(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits


def trained_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.train()(**batch()).loss.backward()
    return tiny.gradients(model)


@pytest.mark.parametrize("offload", [in_memory, on_disk])
@pytest.mark.parametrize("method", ADAPTERS)
def test_an_offloaded_base_takes_an_adapter(
    method: str, offload: Callable[[nn.Module, Path], None], folder: Path, tmp_path: Path
) -> None:
    plain = ADAPTERS[method](tiny.llama(), folder)
    base = tiny.llama()
    offload(base, tmp_path)
    model = ADAPTERS[method](base, folder)
    assert any(p.is_meta for p in model.parameters())
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(said(model), said(plain))
    tiny.assert_same(trained_gradients(model), trained_gradients(plain))


@pytest.mark.parametrize("offload", [in_memory, on_disk])
@pytest.mark.parametrize("method", ADAPTERS)
def test_an_offloaded_adapter_says_the_same_and_refuses_to_train(
    method: str, offload: Callable[[nn.Module, Path], None], folder: Path, tmp_path: Path
) -> None:
    model = ADAPTERS[method](tiny.llama(), folder)
    expected, saved = said(model), {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
    offload(model, tmp_path)
    torch.testing.assert_close(said(model), expected)
    tiny.assert_same(get_peft_model_state_dict(model), saved, rtol=0, atol=0)
    with pytest.raises(LamellaError, match=r"layers\.\d.*set to train and offloaded by accelerate"):
        trained_gradients(model)


def test_a_saved_adapter_is_loaded_on_an_offloaded_base(folder: Path, tmp_path: Path) -> None:
    for method in ("mola", "molex", "mole"):
        plain = ADAPTERS[method](tiny.llama(), folder)
        plain.save_pretrained(tmp_path / method)
        base = tiny.llama()
        in_memory(base, tmp_path)
        torch.testing.assert_close(said(PeftModel.from_pretrained(base, tmp_path / method)), said(plain))
    base = tiny.llama()
    in_memory(base, tmp_path)
    with pytest.raises(LamellaError, match="without low_cpu_mem_usage"):
        PeftModel.from_pretrained(base, tmp_path / "molex", low_cpu_mem_usage=True)


def test_offloaded_experts_are_measured_and_converted(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.llama())
    batches = [tiny.inputs(tiny.llama())]
    layer = next(iter(lamella.moe_layers(model)))
    x = torch.randn(3, layer.experts[0].up.shape[-1])
    expected = lamella.redundancy(model), lamella.collapse(model, batches, rank=4).error, layer.experts[1](x)
    in_memory(model, tmp_path)
    layer = next(iter(lamella.moe_layers(model)))
    actual = lamella.redundancy(model), lamella.collapse(model, batches, rank=4).error, layer.experts[1](x)
    assert actual[0].equals(expected[0])
    assert actual[1] == pytest.approx(expected[1], rel=1e-4)
    torch.testing.assert_close(actual[2], expected[2])


def test_weights_brought_in_by_names_that_change_are_refused() -> None:
    base = tiny.llama()
    cpu_offload(base, execution_device=CPU, preload_module_classes=["LlamaMLP"])
    with pytest.raises(LamellaError, match=r"model\.layers\.0\.mlp as a whole.*preload_module_classes"):
        tiny.adapted(base)
