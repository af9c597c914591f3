"""`lamella similarity` from the first command to the page, on a tiny random model of every family."""

import json
import sys

import pandas as pd
import pytest
from tests import tiny_moe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lamella.cli import main

WORDS = [f"w{number}" for number in range(3, tiny_moe.VOCAB)]


def run(monkeypatch, *words):
    """Exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["lamella", "similarity", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def save_model(family, folder):
    tokens = {word: at for at, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tiny_moe.FAMILIES[family]().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    """Documents of unlike length, by a rule rather than by chance."""
    path = tmp_path / "text.txt"
    lines = [" ".join(WORDS[(7 * d + d * t + t * t) % len(WORDS)] for t in range(8 + d % 9)) for d in range(48)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("family", sorted(tiny_moe.FAMILIES))
def test_every_step_runs_on_every_family(family, text, tmp_path, monkeypatch, capsys):
    model, study = save_model(family, tmp_path / "model"), tmp_path / "study"
    assert run(monkeypatch, "plan", model, "--per-expert", 16, "--flops", 1e9, "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert run(
        monkeypatch, "capture", model, "--text", text, "-o", study, "--per-expert", 48, "--batch-size", 4, "--json"
    ) == 0  # fmt: skip
    captured = json.loads(capsys.readouterr().out)
    assert captured["experts"] == planned["experts"]
    assert run(monkeypatch, "screen", study) == 0
    assert run(monkeypatch, "align", study, "--seeds", 1, "--steps", 3, "--per-source", 2, "--aligner", "linear") == 0
    assert run(monkeypatch, "swap", study, "--unit", "router+experts", "--documents", 6) == 0
    assert run(monkeypatch, "compress", study, "--budget", 0.75, "--documents", 6, "--seeds", 1) == 0
    assert run(monkeypatch, "report", study) == 0
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "Not run" not in page
    alignment = pd.read_parquet(study / "alignment.parquet")
    screened = pd.read_parquet(study / "screen.parquet")
    both = alignment[alignment["kind"] == "pair"].merge(
        screened, on=["source_layer", "source_expert", "target_layer", "target_expert"]
    )
    assert len(both)
    assert (both["nmse"] >= both["floor"] - 1e-6).all()


def test_a_step_out_of_turn_names_the_command_that_is_missing(text, tmp_path, monkeypatch, capsys):
    study = tmp_path / "study"
    assert run(monkeypatch, "screen", study) == 2
    assert "lamella similarity capture" in " ".join(capsys.readouterr().err.split())
    model = save_model("qwen2_moe", tmp_path / "model")
    assert run(monkeypatch, "capture", model, "--text", text, "-o", study, "--per-expert", 8) == 0
    capsys.readouterr()
    assert run(monkeypatch, "compress", study) == 2
    assert "lamella similarity align" in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_another_study_is_not_touched(text, tmp_path, monkeypatch, capsys):
    model, study = save_model("qwen2_moe", tmp_path / "model"), tmp_path / "study"
    assert run(monkeypatch, "capture", model, "--text", text, "-o", study, "--per-expert", 8) == 0
    before = (study / "capture" / "manifest.json").read_bytes()
    assert run(monkeypatch, "capture", model, "--text", text, "-o", study, "--documents", 5) == 2
    assert "documents None there, 5 here" in " ".join(capsys.readouterr().err.split())
    assert (study / "capture" / "manifest.json").read_bytes() == before


def test_another_model_under_the_same_path_is_noticed(text, tmp_path, monkeypatch, capsys):
    model, study = save_model("qwen2_moe", tmp_path / "model"), tmp_path / "study"
    assert run(monkeypatch, "capture", model, "--text", text, "-o", study, "--per-expert", 8) == 0
    tiny_moe.FAMILIES["qwen2_moe"](seed=1).save_pretrained(model)
    capsys.readouterr()
    assert run(monkeypatch, "screen", study) == 2
    assert "model" in capsys.readouterr().err
    assert not (study / "screen.parquet").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["capture", "minilm-is-dense", "--text", "no-such-file.txt"], "could not be loaded"),
        (["plan", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_used_is_named(words, said, tmp_path, monkeypatch, capsys):
    extra = ["-o", tmp_path / "study"] if words[0] == "capture" else []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(monkeypatch, *words, *extra) == 2
    assert said in " ".join(capsys.readouterr().err.split())
