"""Doctor on adapter folders: each fault planted in the files is found, and a healthy folder has none."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from transformers import BertConfig, BertForSequenceClassification

import lamella.lab  # noqa: F401  registers its folders, once for all tests
from lamella import LamellaError, MolaConfig
from lamella.diagnostics.doctor import doctor, register_folder
from lamella.tuners.tensors import AdapterTensors

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path):
    """A model on disk, so that the adapter knows it by name."""
    tiny.bert().save_pretrained(tmp_path / "base")
    return BertForSequenceClassification.from_pretrained(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    torch.manual_seed(3)
    config = MolaConfig(
        r=2, num_experts=4, target_modules=["query", "value"], init_lora_weights=False, task_type="SEQ_CLS"
    )
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change(folder, tensors):
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def the_finding(folder, code, **options):
    diagnosis = doctor(folder, **options)
    assert [finding.code for finding in diagnosis.findings] == [code], str(diagnosis)
    return diagnosis.findings[0]


def test_a_healthy_folder_has_no_finding(adapter):
    diagnosis = doctor(adapter)

    assert diagnosis.ok, str(diagnosis)
    text = str(diagnosis)
    for examined in ("all known", "bit by bit", "arrives at 4 of 4 routers", "not examined on real data"):
        assert examined in text


def test_a_healthy_folder_of_a_bare_transformer_has_no_finding(tmp_path):
    """No task type: the class of the base is the one in the config."""
    tiny.llama().save_pretrained(tmp_path / "base")
    model = type(tiny.llama()).from_pretrained(tmp_path / "base")
    get_peft_model(model, MolaConfig(r=2)).save_pretrained(tmp_path / "adapter")

    diagnosis = doctor(str(tmp_path / "adapter"))

    assert diagnosis.ok, str(diagnosis)
    assert "LlamaForCausalLM" in str(diagnosis)


def test_a_healthy_plain_lora_folder_has_no_finding(base, tmp_path):
    get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS")).save_pretrained(tmp_path / "lora")

    assert doctor(tmp_path / "lora").ok


def test_half_precision_is_no_fault(adapter):
    change(adapter, {name: tensor.bfloat16() for name, tensor in load_file(adapter / WEIGHTS).items()})

    assert doctor(adapter).ok


def test_the_base_may_be_given_as_a_model_and_is_left_alone(adapter, tmp_path):
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    state, modules = {name: t.clone() for name, t in base.state_dict().items()}, [type(m) for m in base.modules()]
    base.train()

    diagnosis = doctor(adapter, base=base, batches=[tiny.batch(base, rows=6, tokens=29)])

    assert diagnosis.ok, str(diagnosis)
    assert [type(module) for module in base.modules()] == modules
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert base.training
    assert all(torch.equal(state[name], tensor) for name, tensor in base.state_dict().items())
    assert "4 of 4 routers judged" in str(diagnosis)


def test_a_dropped_tensor(adapter):
    tensors = load_file(adapter / WEIGHTS)
    dropped = next(name for name in tensors if "router" in name)
    del tensors[dropped]
    change(adapter, tensors)

    assert the_finding(adapter, "tensor-missing").where == dropped


def test_a_dropped_head(adapter):
    change(
        adapter, {name: t for name, t in load_file(adapter / WEIGHTS).items() if not name.endswith("classifier.bias")}
    )

    assert "classifier.bias" in the_finding(adapter, "tensor-missing").where


def test_an_extra_tensor(adapter):
    change(adapter, load_file(adapter / WEIGHTS) | {"base_model.model.bert.somewhere.lora_A": torch.ones(2)})

    assert "somewhere" in the_finding(adapter, "tensor-extra").where


def test_experts_that_the_config_does_not_have(adapter):
    edit(adapter, num_experts=3)

    finding = the_finding(adapter, "base-mismatch")

    assert "(4, 2, 16) in" in finding.where or "is (4, 2, 16)" in finding.where


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(adapter, value):
    tensors = load_file(adapter / WEIGHTS)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = value
    change(adapter, tensors)

    assert the_finding(adapter, "not-finite").where == name


def test_an_unknown_key(adapter):
    edit(adapter, top_kk=2)

    finding = the_finding(adapter, "config-key-unknown")

    assert "'top_kk' (did you mean 'top_k'?)" in finding.what


def test_an_unknown_method(adapter):
    edit(adapter, peft_type="LAMELLA_MOLLA")

    assert "'LAMELLA_MOLA'" in the_finding(adapter, "method-unknown").what


def test_a_value_out_of_range(adapter):
    edit(adapter, top_k=9)

    assert "top_k=9" in the_finding(adapter, "config-invalid").what


def test_a_target_that_matches_nothing(adapter):
    edit(adapter, target_modules=["query", "value", "quary"])

    assert "'quary'" in the_finding(adapter, "target-unmatched").what


def test_pickled_weights(adapter):
    torch.save({}, adapter / "adapter_model.bin")

    assert the_finding(adapter, "pickle-weights").where == "adapter_model.bin"


def test_pickled_weights_alone(adapter):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")

    assert {finding.code for finding in doctor(adapter).findings} == {"pickle-weights", "weights-missing"}


def test_a_file_cut_short(adapter):
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100])

    the_finding(adapter, "weights-unreadable")


def test_another_base_by_name(adapter, tmp_path):
    tiny.bert(seed=1).save_pretrained(tmp_path / "other")

    finding = the_finding(adapter, "base-differs", base=str(tmp_path / "other"))

    assert str(tmp_path / "base") in finding.what
    assert str(tmp_path / "other") in finding.what


def test_another_base_by_shape(adapter, tmp_path):
    wider = BertConfig(**{**tiny.bert().config.to_dict(), "hidden_size": 32})
    BertForSequenceClassification(wider).save_pretrained(tmp_path / "wide")

    diagnosis = doctor(adapter, base=str(tmp_path / "wide"))

    assert {finding.code for finding in diagnosis.findings} == {"base-differs", "base-mismatch"}


def test_another_base_by_depth(adapter, tmp_path):
    tiny.bert(layers=3).save_pretrained(tmp_path / "deep")

    diagnosis = doctor(adapter, base=str(tmp_path / "deep"))

    assert {finding.code for finding in diagnosis.findings} == {"base-differs", "tensor-missing"}


def test_another_base_by_names(adapter):
    diagnosis = doctor(adapter, base=tiny.gpt2())

    assert [finding.code for finding in diagnosis.findings] == ["target-unmatched"]


def test_a_base_with_an_adapter_on_it_is_refused(adapter, base):
    with pytest.raises(LamellaError, match="has an adapter already"):
        doctor(adapter, base=base)


def test_an_allocation_for_another_depth(adapter):
    edit(adapter, num_experts=[4, 4, 4])

    assert "3 entries" in the_finding(adapter, "base-mismatch").what


def test_the_same_base_in_another_place_is_no_fault(adapter, tmp_path):
    (tmp_path / "moved").symlink_to(tmp_path / "base")

    assert doctor(adapter, base=str(tmp_path / "moved")).ok


def test_a_base_that_is_gone(adapter, tmp_path):
    (tmp_path / "base").rename(tmp_path / "elsewhere")

    assert "--base" in the_finding(adapter, "base-missing").fix
    with pytest.raises(LamellaError, match="could not be loaded"):
        doctor(adapter, base=str(tmp_path / "base"))


def test_a_folder_that_loads_unequal(adapter, monkeypatch):
    """Parameters that take another value than the file's."""
    load = AdapterTensors._load_from_state_dict

    def halve(self, state, prefix, *args):
        for name in [name for name in state if "lora_B" in name]:
            state[name] = state[name] / 2
        load(self, state, prefix, *args)

    monkeypatch.setattr(AdapterTensors, "_load_from_state_dict", halve)

    assert "lora_B" in the_finding(adapter, "saved-unequal").where


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(LamellaError, match="neither the folder of an adapter"):
        doctor(tmp_path)
    with pytest.raises(LamellaError, match="There is no folder"):
        doctor(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(LamellaError, match="not valid JSON"):
        doctor(tmp_path)


def test_another_kind_of_folder_is_examined_by_who_registers_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lamella.diagnostics.doctor._FOLDERS", {})
    register_folder("album.json", lambda path, base, batches, examination: examination.saw(f"album {path.name}"))
    (tmp_path / "album.json").write_text("{}")

    assert doctor(tmp_path).checked == (f"album {tmp_path.name}",)
