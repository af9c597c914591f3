import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pairwise import pairwise
from tests.tiny_moe import FAMILIES, HIDDEN, PATHS

from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.similarity.alignment import make_aligner
from lamella.similarity.compression import fold


def drawn(kind, seed=0, rank=3):
    aligner = make_aligner(kind, HIDDEN, rank).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in aligner.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return aligner


@pytest.mark.parametrize(("family", "kind"), pairwise(PATHS, ("linear", "low-rank", "identity")))
def test_the_folded_expert_is_the_expert_behind_the_aligner(family, kind):
    expert = moe_layers(FAMILIES[family](dtype=torch.float64))[-1].experts[1]
    aligner = drawn(kind)
    x = torch.randn(9, HIDDEN, dtype=torch.float64)
    folded = fold(expert, aligner.matrix.double(), aligner.bias.double())
    torch.testing.assert_close(folded(x), expert(aligner(x)), rtol=1e-10, atol=1e-11)
    assert not torch.allclose(expert(x), folded(x)) or kind == "identity"
    assert folded.down is expert.down


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 10))
def test_without_a_bias_no_bias_is_made(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    expert = moe_layers(FAMILIES["mixtral"](dtype=torch.float64))[0].experts[0]
    matrix = scale * torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
    x = torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64)
    folded = fold(expert, matrix)
    assert folded.matrices.keys() == expert.matrices.keys()
    torch.testing.assert_close(folded(x), expert(x @ matrix.T), rtol=1e-8, atol=1e-9)


def test_the_product_is_rounded_once():
    expert = moe_layers(FAMILIES["mixtral"](dtype=torch.bfloat16))[0].experts[0]
    matrix = torch.randn(HIDDEN, HIDDEN)
    folded = fold(expert, matrix)
    assert torch.equal(folded.up, (expert.up.float() @ matrix).bfloat16())


@pytest.mark.parametrize(("matrix", "bias"), [((8, 8), None), ((HIDDEN, HIDDEN), (8,))])
def test_an_aligner_of_another_size_is_refused(matrix, bias):
    expert = moe_layers(FAMILIES["mixtral"]())[0].experts[0]
    with pytest.raises(LamellaError, match="cannot be folded"):
        fold(expert, torch.zeros(matrix), None if bias is None else torch.zeros(bias))
