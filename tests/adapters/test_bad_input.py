"""What cannot be composed is refused in one paragraph that names the culprit, before anything is used."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from torch import Tensor, nn

from lamella import LamellaError, MolaConfig
from lamella.adapters import map_to, read_lora

QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = get_peft_model(tiny.bert(), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def configure(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refused(reference: Path | str, *said: str) -> None:
    with pytest.raises(LamellaError) as error:
        read_lora(reference)
    message = str(error.value)
    assert "\n" not in message
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": None},
        {"lora_alpha": "16"},
        {"r": "2"},
        {"use_rslora": "false"},
        {"alpha_pattern": None},
        {"alpha_pattern": {"query": "3"}},
        {"rank_pattern": {"query": 2.0}},
    ],
    ids=str,
)
def test_settings_of_a_wrong_kind_are_named(fields: dict[str, object], folder: Path) -> None:
    configure(folder, **fields)
    refused(folder, next(iter(fields)), "in its config, which must be")


def test_an_alpha_beside_the_tensors_that_the_config_contradicts(folder: Path) -> None:
    beside = {f"{QUERY}.alpha": torch.tensor(8.0)}  # as the config has it, which PEFT reads
    change(folder, lambda tensors: tensors.update(beside))
    assert read_lora(folder).components["model"][QUERY.removeprefix("base_model.model.")].scaling == 4
    change(folder, lambda tensors: tensors.update({f"{QUERY}.alpha": torch.tensor(2.0)}))
    refused(folder, "query.alpha", "a scaling of 1, where its config says 4")


def test_a_lora_that_is_multiplied_by_zero_adds_nothing(folder: Path) -> None:
    configure(folder, lora_alpha=0)
    with pytest.warns(UserWarning, match="adds nothing"):
        read_lora(folder)


def test_tensors_of_modules_that_the_config_does_not_adapt_are_named(folder: Path) -> None:
    configure(folder, layers_to_transform=[1])
    with pytest.warns(UserWarning, match=r"LoRAs of 1 modules that its config does not adapt, .*layer\.0\..*query"):
        map_to(tiny.bert(), read_lora(folder))


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt", "pth"])
def test_a_pickle_is_never_opened(suffix: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (Path.touch, (tmp_path / "exploded",))  # type: ignore[return-value]

    torch.save(Bomb(), tmp_path / f"lora.{suffix}")
    refused(tmp_path / f"lora.{suffix}", f"lora.{suffix}", "pickle", "safetensors")
    refused(tmp_path, f"lora.{suffix}", "pickle")
    refused(f"somebody/styles/lora.{suffix}", "pickle")
    assert not (tmp_path / "exploded").exists()


def test_a_peft_folder_with_a_pickle_alone(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin", "pickle")


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "missing", "missing", "not a file or folder")
    refused(tmp_path, "holds no LoRA", "adapter_config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "no adapter_model.safetensors")
    with pytest.raises(LamellaError, match="has no 'inner'"):
        read_lora(tmp_path, subfolder="inner")


def test_a_folder_with_several_files_asks_which_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x.lora_A.weight": torch.ones(1, 1)}, tmp_path / f"{name}.safetensors")
    refused(tmp_path, "a.safetensors, b.safetensors", "name the file")


def test_a_file_that_is_cut_short_or_empty(folder: Path, tmp_path: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file({}, tmp_path / "empty.safetensors")
    refused(tmp_path / "empty.safetensors", "empty")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(folder, "cut short", "adapter_model.safetensors")
    save_file({}, weights)
    refused(folder, "holds no LoRA", "empty")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(number: float, folder: Path) -> None:
    change(folder, lambda tensors: tensors[f"{QUERY}.lora_B.weight"][0].fill_(number))
    refused(folder, "not finite", "layer.0.attention.self.query.lora_B")


def test_an_a_without_b_and_ranks_that_differ(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({f"{QUERY}.lora_B.weight": torch.ones(16, 3)}))
    refused(folder, "A (2, 16) and B (16, 3)")
    change(folder, lambda tensors: tensors.pop(f"{QUERY}.lora_B.weight"))
    refused(folder, "lora_A without lora_B")


def test_tensors_nobody_knows(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({f"{QUERY}.mystery": torch.ones(1)}))
    refused(folder, "query.mystery", "do not belong to any known kind of LoRA")


def test_one_module_twice(folder: Path) -> None:
    bare = QUERY.removeprefix("base_model.model.")
    change(folder, lambda tensors: tensors.update({f"{bare}.lora_A.weight": torch.ones(2, 16)}))
    refused(folder, "twice")


def test_a_config_of_another_lora(folder: Path) -> None:
    configure(folder, r=7)
    refused(folder, "has rank 2", "config says 7")


def test_a_config_that_is_no_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[1")
    refused(folder, "adapter_config.json", "not a JSON")


def test_other_methods_are_named(tmp_path: Path) -> None:
    get_peft_model(tiny.bert(), IA3Config(target_modules=["query"], feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    refused(tmp_path / "ia3", "IA3", "not a LoRA")
    get_peft_model(tiny.bert(), MolaConfig()).save_pretrained(tmp_path / "mola")
    refused(tmp_path / "mola", "LAMELLA_MOLA", "export_experts")


@pytest.mark.parametrize("key", ["hada_w1_a", "lokr_w1", "oft_blocks"])
def test_other_methods_in_a_single_file_are_named(key: str, tmp_path: Path) -> None:
    save_file({f"lora_unet_mid_block.{key}": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", key, "not a LoRA")


def test_a_dora_is_refused_by_name(tmp_path: Path) -> None:
    get_peft_model(tiny.bert(), LoraConfig(target_modules=["query"], use_dora=True)).save_pretrained(tmp_path / "dora")
    refused(tmp_path / "dora", "DoRA", "use_dora")
    save_file({"lora_unet_mid_block.dora_scale": torch.ones(2)}, tmp_path / "dora.safetensors")
    refused(tmp_path / "dora.safetensors", "DoRA", "lora_unet_mid_block.dora_scale")


@pytest.mark.parametrize(
    ("field", "value"), [("init_lora_weights", "pissa"), ("layer_replication", [[0, 2]]), ("target_parameters", ["w"])]
)
def test_loras_that_are_more_than_a_sum_are_named(field: str, value: object, folder: Path) -> None:
    configure(folder, **{field: value})
    refused(folder, field)


def test_pefts_names_without_a_config_have_no_scaling(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").rename(tmp_path / "alone.safetensors")
    refused(tmp_path / "alone.safetensors", "no adapter_config.json", "scaling")


def test_a_model_of_another_width_names_both(folder: Path) -> None:
    configure(folder, base_model_name_or_path="somebody/small-bert")
    source = read_lora(folder)
    wide = tiny.bert()
    wide.bert.encoder.layer[0].attention.self.query = nn.Linear(16, 20)
    wide.config._name_or_path = "somebody/wide-bert"
    with pytest.raises(LamellaError) as error:
        map_to(wide, source)
    for words in ("somebody/small-bert", "16 features to 20", "layer.0.attention.self.query"):
        assert words in str(error.value)


def test_modules_that_the_model_lacks_are_named(folder: Path) -> None:
    with pytest.raises(LamellaError, match="adapts 2 of 2 modules that LlamaForCausalLM does not have") as error:
        map_to(tiny.llama(), read_lora(folder))
    assert "bert.encoder.layer.0.attention.self.query" in str(error.value)
    shallow = tiny.bert(layers=1)
    with pytest.raises(LamellaError, match="adapts 1 of 2 modules") as error:
        map_to(shallow, read_lora(folder))
    assert "bert.encoder.layer.1.attention.self.query" in str(error.value)


def test_a_module_that_is_not_linear_is_named(folder: Path) -> None:
    model = tiny.bert()
    model.bert.encoder.layer[1].attention.self.query = nn.Embedding(16, 16)
    with pytest.raises(LamellaError, match="is a Embedding, not a linear layer"):
        map_to(model, read_lora(folder))
