"""A family that lamella has never seen needs no file if it follows transformers' contract, and one class if not."""

import pytest
import torch
from tests import tiny_moe
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from lamella.backbones.moe import FAMILIES, Expert, MoEFamily, moe_layers, register
from lamella.backbones.moe.expert import Gated
from lamella.errors import LamellaError
from lamella.similarity import capture, compress, swap


class NovelExperts(MixtralExperts):
    """Kept as transformers keeps experts, with a gating of its own."""

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.tanh(gate).clamp(max=0.5) * (up + 1)


class NovelBlock(MixtralSparseMoeBlock):
    """Names nobody has told lamella of."""


class ListedExperts(nn.Module):
    """Experts as a list of modules, which transformers' contract does not know."""

    def __init__(self, stacked) -> None:
        super().__init__()
        self.num_experts = stacked.num_experts
        self.up = nn.ParameterList(one.chunk(2)[1] for one in stacked.gate_up_proj.detach())
        self.gate = nn.ParameterList(one.chunk(2)[0] for one in stacked.gate_up_proj.detach())
        self.down = nn.ParameterList(list(stacked.down_proj.detach()))

    def forward(self, hidden, indices, weights):
        output = torch.zeros_like(hidden)
        for e in range(self.num_experts):
            weight = (weights * (indices == e)).sum(-1, keepdim=True)
            units = nn.functional.silu(hidden @ self.gate[e].t()) * (hidden @ self.up[e].t())
            output += weight.to(hidden.dtype) * (units @ self.down[e].t())
        return output


class ListedBlock(MixtralSparseMoeBlock):
    """Holds a list of experts."""


def built(block, listed):
    model = tiny_moe.FAMILIES["mixtral"]()
    for module in model.modules():
        if isinstance(module, MixtralSparseMoeBlock):
            module.__class__ = block
            if listed:
                module.experts = ListedExperts(module.experts)
            else:
                module.experts.__class__ = NovelExperts
    return model


@pytest.fixture
def family():
    before = len(FAMILIES)

    @register
    class Listed(MoEFamily):
        sparse = ("ListedBlock",)

        def expert(self, sparse, index):
            experts = self.experts(sparse)
            return Expert(experts.up[index], experts.down[index], Gated(nn.functional.silu), experts.gate[index])

    yield Listed
    del FAMILIES[before:]


def every_step_works(model, folder):
    given = tiny_moe.inputs()
    layers = moe_layers(model)
    assert len(layers) == 3
    taken = capture(model, [given], folder)
    assert len(taken.experts) == 3 * tiny_moe.EXPERTS
    with torch.no_grad():
        plain = model(**given).logits
        with layers[0].replace(dict(enumerate(layers[0].experts))):
            torch.testing.assert_close(model(**given).logits, plain)
        with layers[0].mask([1]):
            assert not torch.equal(model(**given).logits, plain)
        with swap(model, (0, 1), (2, 3)):
            assert not torch.equal(model(**given).logits, plain)
        assert torch.equal(model(**given).logits, plain)
    assert compress(model, taken, 0.5, texts=[given]).report.experts_left == 6


def test_what_follows_the_contract_needs_no_file(tmp_path):
    every_step_works(built(NovelBlock, listed=False), tmp_path)


def test_what_does_not_is_named(tmp_path):
    with pytest.raises(LamellaError, match="ListedBlock"):
        moe_layers(built(ListedBlock, listed=True))


def test_and_works_by_one_class(family, tmp_path):
    model = built(ListedBlock, listed=True)
    assert {type(layer.family) for layer in moe_layers(model)} == {family}
    every_step_works(model, tmp_path)
