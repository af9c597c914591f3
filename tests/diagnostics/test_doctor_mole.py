import pytest
import torch
from tests import tiny
from tests.tuners.mole.trained import composition, lora, routers_of, sharpen

from lamella import doctor, preflight


@pytest.fixture
def batch():
    ids = torch.arange(96).remainder(tiny.VOCAB - 3).add(3)[:, None] + torch.arange(7)
    ids = ids.remainder(tiny.VOCAB - 3).add(3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(96) % 3}


@pytest.fixture
def composed(tmp_path):
    def make(**config):
        return composition("bert", tmp_path, double=False, task_type="SEQ_CLS", **config)

    return make


def favour(model, loras):
    """Routers that are nearly certain, those of the units of these LoRAs in turn."""
    for index, router in enumerate(routers_of(model).values()):
        router.e.data.zero_()
        router.bias.data = 9.0 * torch.eye(3)[loras[index % len(loras)]]


def codes(diagnosis):
    return {finding.code for finding in diagnosis.findings}


@pytest.mark.parametrize("balance", ["log", "entropy", "switch", "none"])
def test_a_fresh_composition_has_no_finding_and_every_router_a_gradient(batch, composed, balance):
    model = composed(balance=balance)
    diagnosis = doctor(model, batches=[batch])
    assert not codes(diagnosis), diagnosis
    routers = len(routers_of(model))
    assert any(f"arrives at {routers} of {routers} routers" in line for line in diagnosis.checked)
    assert any(f"{routers} of {routers} routers judged" in line for line in diagnosis.checked)
    if balance != "none":
        assert any(f"balance loss in training mode: {routers} of {routers}" in line for line in diagnosis.checked)


@pytest.mark.parametrize("granularity", ["matrix", "sublayer", "network"])
def test_routers_that_read_what_they_are_given_have_no_finding(batch, composed, granularity):
    model = composed(granularity=granularity)
    sharpen(model, 0.3)
    assert not codes(doctor(model, batches=[batch]))


def test_weights_that_are_certain_and_a_lora_that_never_counts_are_found(batch, composed):
    model = composed()
    favour(model, [1])
    diagnosis = doctor(model, batches=[batch])
    assert codes(diagnosis) == {"entropy-near-zero", "lora-never-counts"}
    unused = next(finding for finding in diagnosis.findings if finding.code == "lora-never-counts")
    assert "2 of 3 LoRAs" in unused.what
    assert "news" in unused.where
    assert "law" in unused.where


def test_a_lora_that_counts_somewhere_counts(batch, composed):
    model = composed(layers=3)
    favour(model, [0, 1, 2])
    assert codes(doctor(model, batches=[batch])) == {"entropy-near-zero"}


def test_a_frozen_router_is_found(batch, composed):
    model = composed()
    first = next(iter(routers_of(model).values()))
    first.requires_grad_(False)
    assert codes(doctor(model, batches=[batch])) == {"router-no-gradient"}


def test_preflight_passes(batch, composed):
    assert preflight(composed(), batch, steps=10).ok


def test_a_lora_that_adds_nothing_is_found(batch, composed, tmp_path):
    path = lora("bert", tmp_path, 0) / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 0'))

    (finding,) = preflight(composed(), batch).findings

    assert finding.code == "lora-adds-nothing"
    assert finding.where == "news"
