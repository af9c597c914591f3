"""Adapters that the first edition wrote load, and compute what they computed then.

Another processor than the one that wrote their logits sums in another order, so those are compared up to rounding: in
float64 they come out up to 1.2e-4 otherwise, and without the adapter by 2 and more. What one processor computes twice
is equal to the last bit.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lamella.routing import collect_losses

WRITTEN = Path(__file__).parents[1] / "first_edition"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())["adapters"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return shutil.copytree(WRITTEN, tmp_path_factory.mktemp("first") / "edition")


@pytest.fixture(params=EXPECTED)
def adapter(request, folder, monkeypatch) -> str:
    monkeypatch.chdir(folder)  # paths in these files are relative to it
    return request.param


def load(adapter: str, trainable: bool = False) -> PeftModel:
    base = EXPECTED[adapter]["base"]
    kind = AutoModelForSequenceClassification if base == "base/bert" else AutoModelForCausalLM
    return PeftModel.from_pretrained(kind.from_pretrained(base).eval(), adapter, is_trainable=trainable)


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**load_file("base/inputs.safetensors")).logits


def written_logits(adapter: str) -> torch.Tensor:
    method, name = adapter.split("/")
    return load_file(f"{method}/logits.safetensors")[name]


def test_it_loads_with_the_values_that_it_was_saved_with(adapter):
    written = json.loads(Path(adapter, "adapter_config.json").read_text())
    config = load(adapter).peft_config["default"]
    assert config.lamella_version == written["lamella_version"] == "0.1.0"
    assert config.router_aux_loss_coef == written["balance_coef"]
    assert config.init_lora_weights == written["init_weights"]
    assert getattr(config, "router_z_loss_coef", None) == written.get("z_coef")


def test_its_logits_are_what_they_were(adapter):
    torch.testing.assert_close(logits(load(adapter)), written_logits(adapter), rtol=1e-3, atol=5e-4)


def test_its_losses_are_what_they_were(adapter):
    model, expected = load(adapter, trainable=True), EXPECTED[adapter]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["parameters"]
    inputs = load_file("base/inputs.safetensors")
    if expected["base"] == "base/bert":
        labels = torch.tensor([0, 1, 2, 0])
    else:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :3] = -100
    task = model.eval()(**inputs, labels=labels).loss
    with collect_losses() as losses:
        model.train()(**inputs, labels=labels)
    assert task.item() == pytest.approx(expected["loss"]["task"], rel=1e-5)
    assert losses.total().item() == pytest.approx(expected["loss"]["routers"], rel=1e-5)


def test_saved_again_it_is_in_the_words_of_this_version_and_the_same(adapter, tmp_path):
    load(adapter).save_pretrained(tmp_path, save_embedding_layers=False)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"balance_coef", "z_coef", "init_weights"} & set(written)
    base = load(adapter).unload()
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(load(adapter)))


@pytest.mark.parametrize("given", ["mole/loras/{}", "./mole/loras/{}"])
def test_loras_that_were_named_relative_to_the_working_directory_are_read_and_saved_for_any(
    given, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(folder)
    copy = shutil.copytree("mole/defaults", tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    for name, reference in config["adapters"].items():
        reference["source"] = given.format(name)
    (copy / "adapter_config.json").write_text(json.dumps(config))
    base = AutoModelForCausalLM.from_pretrained("base/llama").eval()
    model = PeftModel.from_pretrained(base, copy)
    expected = logits(load("mole/defaults"))
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    base = model.unload()
    inputs = load_file("base/inputs.safetensors")
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path / "again").eval()(**inputs).logits, expected)
