"""`lamella library`."""

import json

import torch
from peft import LoraConfig, get_peft_model
from tests import tiny


def save(folder, seed):
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    get_peft_model(tiny.bert(), config).save_pretrained(folder)


def test_a_folder_is_indexed_and_listed_with_what_is_left_out(lamella, tmp_path):
    for seed, name in enumerate(("law", "news")):
        save(tmp_path / name, seed)
    (tmp_path / "old.bin").write_bytes(b"pickle")

    status, out, _ = lamella("library", "index", tmp_path)
    assert status == 0
    assert "2 LoRAs" in out
    assert "left out old" in out
    assert (tmp_path / "lamella_library.safetensors").is_file()

    status, out, _ = lamella("library", "list", tmp_path, "--json")
    listed = json.loads(out)
    assert status == 0
    assert [one["name"] for one in listed["loras"]] == ["law", "news"]
    assert listed["loras"][0]["targets"] == ["query"]
    assert "pickle" in listed["left_out"]["old"]

    status, _, err = lamella("library", "list", tmp_path)
    assert status == 0
    assert "news" in err

    status, _, err = lamella("library", "index", tmp_path / "nowhere")
    assert status == 2
    assert "is no folder" in err
