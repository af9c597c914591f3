import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from benchmarks.encoder import build_batch, build_encoder, forward
from benchmarks.naive_mola import NaiveMola, naive_copy
from lamella import MolaConfig
from lamella.kernels import mix_reference


@settings(max_examples=20, deadline=None)
@given(num_experts=st.integers(2, 6), tokens=st.integers(1, 9), seed=st.integers(0, 1000))
def test_the_naive_layer_computes_the_reference_form(num_experts, tokens, seed):
    torch.manual_seed(seed)
    layer = NaiveMola(torch.nn.Linear(5, 7), num_experts, r=3, top_k=2, scaling=0.5).double()
    x = torch.randn(tokens, 5, dtype=torch.float64)
    probs = torch.softmax(layer.router(x), dim=-1)
    kept = torch.where(probs >= probs.topk(2, dim=-1).values[:, -1:], probs, 0.0)
    weights = kept / kept.sum(dim=-1, keepdim=True)
    down = torch.stack([linear.weight for linear in layer.down])
    up = torch.stack([linear.weight for linear in layer.up])
    expected = mix_reference(layer.base(x), x, down, up, weights, scaling=0.5)
    torch.testing.assert_close(layer(x), expected)


def test_an_expert_without_tokens_has_a_gradient_of_zeros():
    layer = NaiveMola(torch.nn.Linear(4, 4), 3, r=2, top_k=1, scaling=1.0)
    with torch.no_grad():
        layer.router.weight[1:] = -layer.router.weight[0]
    x = layer.router.weight[0].detach().expand(6, 4)  # every token chooses the first
    layer(x).sum().backward()
    gradients = layer.gradients()
    assert gradients["A"].shape == (3, 2, 4)
    assert gradients["B"][0].abs().sum() > 0
    assert gradients["B"][1:].abs().sum() == 0


@pytest.fixture
def mola():
    torch.manual_seed(0)
    base = build_encoder(hidden=32, layers=4)
    config = MolaConfig(num_experts="2-4-6-8", router_aux_loss_coef=0.0, init_lora_weights=False)
    return base, get_peft_model(copy.deepcopy(base), config)


def test_a_copy_gives_the_same_output_and_leaves_base_and_model_alone(mola):
    base, model = mola
    batch = build_batch(tokens=16, hidden=32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    naive = naive_copy(base, model)
    torch.testing.assert_close(forward(naive, batch), forward(model, batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(forward(base, batch), forward(model, batch))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, NaiveMola) for module in base.modules())


def test_a_copy_trains_as_many_parameters(mola):
    base, model = mola
    naive = naive_copy(base, model)

    def trainable(module):
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    assert trainable(naive) == trainable(model)
