"""A capture that lives in memory, of a small model whose experts differ, for tests of the aligners."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from lamella.backbones.moe import Expert, moe_layers
from lamella.backbones.moe.expert import Gated
from lamella.similarity.activations.keys import hashed, unit


def random_expert(hidden: int, ff: int, seed: int, dtype: torch.dtype = torch.float32, gate: bool = True) -> Expert:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype) / shape[-1] ** 0.5

    if gate:
        return Expert(matrix(ff, hidden), matrix(hidden, ff), Gated(nn.functional.silu), matrix(ff, hidden))
    biases = {"up_bias": matrix(ff), "down_bias": matrix(hidden)}
    return Expert(matrix(ff, hidden), matrix(hidden, ff), lambda _, up: nn.functional.gelu(up), **biases)


def tiny_model(hidden: int = 16, experts: int = 3, ff: int = 12, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=48, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        moe_intermediate_size=ff, shared_expert_intermediate_size=ff, num_experts=experts, num_experts_per_tok=2,
        intermediate_size=24,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in moe_layers(model):
        for index, expert in enumerate(layer.experts):
            for matrix in expert.matrices.values():
                torch.nn.init.normal_(matrix, std=(1 + index) * matrix.shape[1] ** -0.5)
    return model


@dataclass
class FakeCapture:
    """The read side of a capture."""

    samples: dict[tuple[int, int], Tensor]
    documents: dict[tuple[int, int], Tensor]

    @property
    def experts(self) -> list[tuple[int, int]]:
        return list(self.samples)

    @property
    def hidden_size(self) -> int:
        return next(iter(self.samples.values())).shape[1]

    def inputs(self, layer: int, expert: int) -> Tensor:
        return self.samples[layer, expert]

    def rows(self, layer: int, expert: int) -> Tensor:
        return self.documents[layer, expert]

    def split(self, layer: int, expert: int, held_out: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
        apart = unit(hashed(seed, self.documents[layer, expert])) < held_out
        return torch.where(~apart)[0], torch.where(apart)[0]

    def check(self, model: nn.Module, tokenizer: object = None) -> None:
        pass


def fake_capture(model: nn.Module, samples: int = 200, documents: int = 40, seed: int = 0) -> FakeCapture:
    """Inputs with a mean and correlated features; every expert has some tokens more than the one before."""
    generator = torch.Generator().manual_seed(seed)
    names = [(layer.index, expert) for layer in moe_layers(model) for expert in range(layer.num_experts)]
    hidden = moe_layers(model)[0].experts[0].up.shape[1]
    mixing = torch.randn(hidden, hidden, generator=generator) / hidden**0.5 + torch.eye(hidden)
    inputs, rows = {}, {}
    for at, name in enumerate(names):
        count = samples + 7 * at
        inputs[name] = torch.randn(count, hidden, generator=generator) @ mixing + 0.3
        rows[name] = torch.randint(documents, (count,), generator=generator)
    return FakeCapture(inputs, rows)
