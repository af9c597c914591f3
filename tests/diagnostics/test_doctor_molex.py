import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import tiny

from lamella import MolexConfig, doctor, preflight
from lamella.tuners.molex.block import MolexBlock

LORA = LoraConfig(r=2, target_modules=["query", "value"])


def mixture(**config):
    return get_peft_model(tiny.bert(layers=4), MolexConfig(task_type="SEQ_CLS", lora=LORA, **config))


@pytest.fixture
def batch():
    # a sequence repeats one token: otherwise the means of all are alike, and so are their guests
    ids = torch.arange(96).remainder(tiny.VOCAB - 3).add(3)[:, None].repeat(1, 7)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(96) % 3}


def spread(model):
    """Routers whose choices differ between sequences, and that are not sure of them."""
    for block in model.modules():
        if isinstance(block, MolexBlock) and "default" in block.lamella_molex_router:
            torch.nn.init.normal_(block.lamella_molex_router["default"].weight, std=0.5)
    return model


def codes(diagnosis):
    return {finding.code for finding in diagnosis.findings}


@pytest.mark.parametrize("scope", ["shared", "per-layer"])
@pytest.mark.parametrize("gradient", ["scale", "straight-through"])
def test_a_healthy_mixture_has_no_finding(batch, scope, gradient):
    model = spread(mixture(router_scope=scope, router_gradient=gradient, alpha=0.9))

    diagnosis = doctor(model, batches=[batch])

    assert not codes(diagnosis), diagnosis
    assert any("arrives at 4 of 4 routers" in line for line in diagnosis.checked)
    assert any("move the hidden states" in line for line in diagnosis.checked)


def test_one_guest_for_all_inputs_is_found(batch):
    model = mixture(router_scope="per-layer")
    for block in (block for block in model.modules() if isinstance(block, MolexBlock)):
        torch.nn.init.zeros_(block.lamella_molex_router["default"].weight)
        block.lamella_molex_router["default"].bias.data = torch.tensor([0.0, 0.5, 0.0, 0.0])

    diagnosis = doctor(model, batches=[batch])

    assert codes(diagnosis) == {"one-guest-for-all"}
    assert "at 4 block(s)" in diagnosis.findings[0].what


def test_guests_that_overwhelm_the_stream_are_found(batch):
    model = spread(mixture(alpha=0.1, policy="random"))
    for block in (block for block in model.modules() if isinstance(block, MolexBlock)):
        block.base_layer.output.LayerNorm.bias.data += 5 * torch.randn(block.base_layer.output.LayerNorm.bias.shape)

    assert "guest-overwhelms" in codes(doctor(model, batches=[batch]))


def test_a_start_worse_than_the_base_is_found(batch):
    model = mixture(alpha=0.0, policy="fixed", fixed_layer=0).eval()
    with model.disable_adapter(), torch.no_grad():
        mean = model(**batch).logits.mean(0)
    for name, parameter in model.named_parameters():
        if "classifier" in name:
            parameter.data = 3e5 * (parameter.data - mean if "bias" in name else parameter.data)
    with model.disable_adapter(), torch.no_grad():
        labels = model(**batch).logits.argmax(-1)  # what the base gets right

    diagnosis = preflight(model, batch | {"labels": labels})

    assert "guests-harm" in codes(diagnosis), diagnosis


def test_a_frozen_router_is_found_and_one_that_cannot_learn_is_no_fault(batch):
    model = mixture()
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.requires_grad_(False)
    assert "router-no-gradient" in codes(doctor(model, batches=[batch]))

    published = mixture(router_gradient="none", router_aux_loss_coef=0.0)
    assert "router-no-gradient" not in codes(doctor(published, batches=[batch]))
