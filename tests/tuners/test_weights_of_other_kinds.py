"""Frozen layers whose weight is not a plain tensor, as torchao's is not: their own forward runs."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lamella import MoleConfig, compose


class Int8(Tensor):
    """A weight in codes and scales, NaN to who does not ask for a linear layer's product."""

    codes: Tensor
    scales: Tensor

    def plain(self) -> Tensor:
        return self.codes.to(self.scales.dtype) * self.scales

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and hasattr(args[1], "codes"):
            return func(args[0], args[1].plain(), *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


def in_codes(weight: Tensor) -> nn.Parameter:
    hidden = torch.full_like(weight, torch.nan).as_subclass(Int8)
    made = nn.Parameter(hidden, requires_grad=False)
    made.scales = weight.abs().amax(dim=1, keepdim=True) / 127
    made.codes = (weight / made.scales).round().to(torch.int8)
    return made


def base(quantised: bool) -> LlamaForCausalLM:
    """A model whose linear layers in the blocks hold rounded weights, in codes or written out."""
    model = tiny.llama()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            weight = in_codes(module.weight.detach())
            module.weight = weight if quantised else nn.Parameter(weight.plain(), requires_grad=False)
    return model


class Coded(nn.Linear):
    """A quantised layer, whose weight is numbers of another kind."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, dtype=layer.weight.dtype)
        self.scales = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scales).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scales).t().to(x.dtype)


METHODS: dict[str, Callable[[LlamaForCausalLM, Path], PeftModel]] = {
    "mola": lambda model, _: tiny.adapted(model),
    "mole": lambda model, folder: compose(model, trained.loras("llama", folder), MoleConfig()),
    "mole token": lambda model, folder: compose(
        model, trained.loras("llama", folder), MoleConfig(router_input="token", granularity="matrix")
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_a_subclass_of_a_tensor_is_left_to_its_own_layer(method: str, folder: Path) -> None:
    given = tiny.inputs(tiny.llama(), tokens=24)  # so many that the LoRAs are merged into a plain matrix
    expected = trained.run(METHODS[method](base(quantised=False), folder).eval(), given)
    model = METHODS[method](base(quantised=True), folder)
    assert any(type(module.weight) is Int8 for module in model.modules() if isinstance(module, nn.Linear))
    torch.testing.assert_close(trained.run(model.eval(), given), expected)


@pytest.mark.parametrize(
    ("dtype", "quantised", "warns"),
    [(torch.bfloat16, True, True), (torch.float32, True, False), (torch.bfloat16, False, False)],
)
def test_a_quantised_base_that_was_not_prepared_is_said(
    dtype: torch.dtype, quantised: bool, warns: bool, tmp_path: Path
) -> None:
    def loaded_base() -> LlamaForCausalLM:
        model = tiny.llama().to(dtype)
        for layer in model.model.layers if quantised else ():
            layer.self_attn.q_proj = Coded(layer.self_attn.q_proj)
        return model

    trained_model = tiny.adapted(loaded_base(), target_modules=["q_proj", "v_proj"])
    trained_model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(loaded_base(), tmp_path)
    said = [str(one.message) for one in caught if "prepare_model_for_kbit_training" in str(one.message)]
    assert len(said) == warns
    if warns:
        assert "bfloat16" in said[0]
        assert "q_proj" in said[0]
