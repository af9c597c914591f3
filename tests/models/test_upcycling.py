"""A dense Llama as a mixture: the same function until its experts are trained apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lamella.errors import LamellaError
from models.upcycling import last_layers, put_experts, states_before, upcycled

IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))


def llama(layers=4, seed=0, **own):
    """In the shape of SmolLM2: grouped keys, heads of a width of their own, a base of its positions, tied head."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": layers,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": True, **own,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config)).requires_grad_(False).eval()


@settings(max_examples=8, deadline=None)
@given(layers=st.integers(1, 3), experts=st.integers(2, 5), top_k=st.integers(1, 2), tied=st.booleans())
def test_before_training_the_mixture_is_the_dense_model(layers, experts, top_k, tied):
    model = llama(tie_word_embeddings=tied)
    mixture = upcycled(model, layers, experts, top_k)

    torch.testing.assert_close(mixture(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    assert [hasattr(layer.mlp, "experts") for layer in mixture.model.layers] == [False] * (4 - layers) + [True] * layers


def test_a_saved_mixture_is_the_same(tmp_path):
    mixture = upcycled(llama(), 2, 4, 2)
    mixture.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()

    torch.testing.assert_close(loaded(IDS).logits, mixture(IDS).logits, atol=1e-6, rtol=0)


def test_an_expert_computes_what_the_mlp_that_was_put_there_did():
    model, others = llama(), [llama(seed=seed) for seed in (1, 2, 3)]
    mixture = upcycled(model, 1, 3, 1)
    sparse = mixture.model.layers[-1].mlp
    put_experts(sparse.experts, [other.model.layers[-1].mlp.state_dict() for other in others])
    x = torch.randn(9, 24)
    found = sparse(x[None])[0]

    chosen = sparse.gate(x)[2][:, 0]
    assert len(chosen.unique()) > 1
    for expert, other in enumerate(others):
        expected = other.model.layers[-1].mlp(x[chosen == expert])
        torch.testing.assert_close(found[chosen == expert], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", [llama, lambda: upcycled(llama(), 2, 4, 2)])
def test_first_and_last_layers_are_the_whole_model(make):
    model = make()
    logits, layers = model(IDS).logits, len(model.model.layers)
    states = states_before(model, 2, IDS, batch_size=2)

    torch.testing.assert_close(last_layers(model, 2)(inputs_embeds=states).logits, logits, atol=1e-6, rtol=0)
    assert len(model.model.layers) == model.config.num_hidden_layers == layers
    torch.testing.assert_close(model(IDS).logits, logits, atol=0, rtol=0)


def test_training_the_last_layers_trains_the_model():
    model = llama()
    last = last_layers(model, 1)
    before = model(IDS).logits
    last.model.layers[0].mlp.down_proj.weight.data.mul_(2)

    assert not torch.equal(model(IDS).logits, before)


def test_router_logits_come_once_for_each_layer():
    mixture = upcycled(llama(), 2, 4, 2)
    states = states_before(mixture, 2, IDS)

    assert len(last_layers(mixture, 2)(inputs_embeds=states, output_router_logits=True).router_logits) == 2


@pytest.mark.parametrize(
    ("own", "layers", "message"),
    [
        ({"attention_bias": True}, 1, "biases"),
        ({"mlp_bias": True}, 1, "biases"),
        ({}, 0, "layers=0 of 4"),
        ({}, 4, "layers=4 of 4"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(own, layers, message):
    with pytest.raises(LamellaError, match=message):
        upcycled(llama(**own), layers, 4, 2)


def test_another_family_is_refused():
    with pytest.raises(LamellaError, match="A qwen2_moe cannot be made a mixture"):
        upcycled(upcycled(llama(), 1, 2, 1), 1, 2, 1)
