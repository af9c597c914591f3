"""A family that lamella has never seen is one class with one method; then every step works on its models."""

import pytest
import torch
from tests import tiny_moe
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from lamella.backbones.moe import FAMILIES, MoEFamily, moe_layers, register
from lamella.backbones.moe.family import softmax_top_k
from lamella.errors import LamellaError
from lamella.similarity import capture, compress, swap


class NovelSparseMoeBlock(MixtralSparseMoeBlock):
    """Laid out as transformers lays out experts, under a name of its own."""


@pytest.fixture
def model():
    built = tiny_moe.FAMILIES["mixtral"]()
    for module in built.modules():
        if isinstance(module, MixtralSparseMoeBlock):
            module.__class__ = NovelSparseMoeBlock
    return built


@pytest.fixture
def family():
    before = len(FAMILIES)

    @register
    class Novel(MoEFamily):
        sparse = ("NovelSparseMoeBlock",)

        def decide(self, router: nn.Module, logits):
            return logits, *softmax_top_k(logits, router.top_k, normalise=True)

    yield Novel
    del FAMILIES[before:]


def test_before_it_is_known_it_is_named(model):
    with pytest.raises(LamellaError, match="NovelSparseMoeBlock"):
        moe_layers(model)


def test_one_class_makes_every_step_work(model, family, tmp_path):
    given = tiny_moe.inputs()
    layers = moe_layers(model)
    assert [type(layer.family) for layer in layers] == [family] * 3
    assert len(capture(model, [given], tmp_path).experts) == 3 * tiny_moe.EXPERTS
    with torch.no_grad():
        plain = model(**given).logits
        with layers[0].mask([1]):
            assert not torch.equal(model(**given).logits, plain)
        with swap(model, (0, 1), (2, 3)):
            assert not torch.equal(model(**given).logits, plain)
        assert torch.equal(model(**given).logits, plain)
    assert compress(model, None, 0.5, method="weight-distance").report.experts_left <= 6
