"""`lamella library`."""

import json
import resource
import shutil

import torch
from peft import LoraConfig, get_peft_model
from tests import tiny
from tests.lab.tiny_runs import sentences

from lamella.adapters.card import CARD


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
    assert "2 LoRAs, 1 kind of targets" in out
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


def test_the_loras_that_help_a_task_are_named_with_what_it_cost(lamella, bert, questions, lora_runs, tmp_path):
    words = ["library", "shortlist", lora_runs, "--index", tmp_path / "index.safetensors", "--model", bert]
    status, out, err = lamella(*words, "--task", questions, "-k", 1, "--examples", 12, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["names"][0] in {"first", "second"}
    assert f"{found['cost']} examples run through the model" in " ".join(err.split())
    assert {row["name"] for row in found["scores"]} == {*found["names"], "the base", "a random LoRA"}

    status, out, _ = lamella(*words, "--task", questions, "-k", 2, "--examples", 12)
    assert status == 0
    assert "on these examples" in out

    status, out, _ = lamella(*words, "--task", questions, "--examples", 12, "--seed", 1, "--json")
    assert status == 0
    other = json.loads(out)
    assert json.loads(lamella(*words, "--task", questions, "--examples", 12, "--seed", 1, "--json")[1]) == other
    assert len(other["names"]) == 2
    by_name = {row["name"]: row for row in found["scores"]}
    assert other["scores"][-1]["loss"] != by_name["the base"]["loss"]  # other rows
    assert 0 <= other["scores"][0]["accuracy"] <= 1

    status, _, err = lamella(*words, "--task", questions, "-k", 3)
    assert status == 2
    assert "k=3" in err


def test_examples_give_a_lora_its_card(lamella, bert, questions, lora_runs, tmp_path):
    pool = tmp_path / "pool"
    for name in ("first", "second"):
        shutil.copytree(lora_runs / name / "adapter", pool / name)
    trained = (pool / "first" / CARD).read_text()
    (pool / "first" / CARD).unlink()
    (pool / "second" / CARD).write_text("{}")
    save(pool / "homeless", 0)

    status, out, _ = lamella("library", "index", pool)
    assert status == 0
    assert "without its card second" in out

    status, out, err = lamella("library", "index", pool, "--examples", f"first={questions}")
    assert status == 0, err
    assert "first: card: one pass of the base over 48 of 48 training rows took" in " ".join(err.split())
    written = json.loads((pool / "first" / CARD).read_text())
    for one, other in zip(written["inputs"], json.loads(trained)["inputs"], strict=True):
        assert one["modules"] == other["modules"]
        torch.testing.assert_close(
            torch.tensor(one["centroids"]), torch.tensor(other["centroids"]), rtol=1e-2, atol=1e-3
        )

    status, out, _ = lamella("library", "list", pool, "--json")
    listed = {one["name"]: one for one in json.loads(out)["loras"]}
    assert (listed["first"]["task"], listed["second"]["task"]) == ("file:questions", "")
    assert listed["first"]["labels"]

    texts = tmp_path / "texts.jsonl"  # labels are not asked for
    texts.write_text("".join(json.dumps({"text": one}) + "\n" for one in sentences(30, 1)))
    status, _, err = lamella("library", "index", pool, "--examples", f"second=file:{texts}")
    assert status == 0, err
    assert json.loads((pool / "second" / CARD).read_text())["labels"] == []

    for wrong, words in [
        ("first", "write --examples NAME=TASK"),
        ("third=trec", "no LoRA 'third'"),
        (f"homeless={questions}", "has no folder with an adapter_config.json that names its base"),
        ("first=file:nowhere.jsonl", "nowhere.jsonl"),
    ]:
        before = (pool / "first" / CARD).read_bytes()
        status, _, err = lamella("library", "index", pool, "--examples", wrong)
        assert status == 2
        assert words in " ".join(err.split())
        assert (pool / "first" / CARD).read_bytes() == before

    try:  # a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        status, _, err = lamella("library", "index", pool, "--examples", f"first={questions}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert status == 2
    assert CARD in " ".join(err.split())
    assert (pool / "first" / CARD).read_bytes() == before
    assert {path.name for path in (pool / "first").iterdir()} == {
        path.name for path in (lora_runs / "first" / "adapter").iterdir()
    }
