import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny_moe
from tests.pairwise import pairwise
from tests.similarity.compression.planted import logits, same_state, state, table
from tests.similarity.compression.test_compression import aligners
from tests.tiny_moe import FAMILIES, PATHS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.similarity.compression import Compressed, compress, saving

AGAIN = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tests.similarity.compression.planted import logits
from lamella.similarity.compression import Compressed
folder = Path(sys.argv[1])
save_file({"logits": logits(Compressed.load(folder).model)}, folder.parent / "logits.safetensors")
"""


def small(family="qwen2_moe", budget=0.5, dtype=torch.float32, **settings):
    model = FAMILIES[family](dtype=dtype)
    return compress(model, table(model), budget, **settings)


@pytest.mark.parametrize(("family", "across"), pairwise(PATHS, (False, True)))
def test_what_is_loaded_is_what_was_saved(tmp_path, family, across):
    saved = small(family, across_layers=across)
    saved.save(tmp_path / "small")
    loaded = Compressed.load(tmp_path / "small")
    assert loaded.report == saved.report
    assert same_state(loaded.model, state(saved.model))
    assert torch.equal(logits(loaded.model), logits(saved.model))
    assert sum(p.numel() for p in loaded.model.parameters()) == saved.report.parameters
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("kind", "ff", "across"),
    [
        ("linear", 2, False),
        ("linear", 12, True),
        ("low-rank", 2, True),
        ("low-rank", 12, False),
        ("layernorm", 12, True),
    ],
)
def test_replacements_are_loaded(tmp_path, kind, ff, across):
    model = FAMILIES["mixtral"](dtype=torch.float64, intermediate_size=ff)
    saved = compress(model, table(model), 0.95, merge=False, aligner=partial(aligners, kind), across_layers=across)
    saved.save(tmp_path / "small")
    loaded = Compressed.load(tmp_path / "small")
    assert torch.equal(logits(loaded.model), logits(saved.model))
    assert sum(p.numel() for p in loaded.model.parameters()) == saved.report.parameters


def test_a_fresh_process_loads_it_bit_for_bit(tmp_path):
    saved = small(dtype=torch.bfloat16, across_layers=True)
    saved.save(tmp_path / "small")
    subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path / "small")], check=True)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(saved.model))


@pytest.mark.parametrize("tied", [False, True])
def test_the_file_holds_each_number_once(tmp_path, tied):
    model = FAMILIES["mixtral"](tie_word_embeddings=tied)
    saved = compress(model, table(model), 0.5, across_layers=True)
    saved.save(tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "compressed.safetensors")
    parameters = dict(saved.model.named_parameters())
    assert sum(tensors[name].numel() for name in parameters) == saved.report.parameters
    buffers = dict(saved.model.named_buffers())
    assert tensors.keys() == parameters.keys() | buffers.keys()
    loaded = Compressed.load(tmp_path / "small").model
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied


def test_nothing_is_overwritten(tmp_path):
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "thesis.txt").write_text("years")
    earlier = small(budget=0.75)
    earlier.save(tmp_path / "small")
    for folder in (papers, tmp_path / "small"):
        with pytest.raises(LamellaError, match="exists already"):
            small().save(folder)
    assert (papers / "thesis.txt").read_text() == "years"
    assert Compressed.load(tmp_path / "small").report == earlier.report


def test_transformers_alone_does_not_open_it(tmp_path):
    small().save(tmp_path / "small")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_the_tokenizer_lies_beside_it(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    small().save(tmp_path / "small", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "small").get_vocab() == {"a": 0, "b": 1}


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(OSError, match="space"):
        small().save(tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(LamellaError, match="no compressed model"):
        Compressed.load(tmp_path)
    folder = tmp_path / "small"
    small().save(folder)
    tensors = load_file(folder / "compressed.safetensors")
    places = next(name for name in tensors if name.endswith("places"))
    headless = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(headless, folder / "compressed.safetensors")
    with pytest.raises(LamellaError, match=r"do not belong together.*lm_head.weight"):
        Compressed.load(folder)
    save_file({name: tensor for name, tensor in tensors.items() if name != places}, folder / "compressed.safetensors")
    with pytest.raises(LamellaError, match="do not belong together"):
        Compressed.load(folder)
    save_file({**tensors, "lm_head.weight": torch.zeros(3, 3)}, folder / "compressed.safetensors")
    with pytest.raises(LamellaError, match="shape"):
        Compressed.load(folder)
    (folder / "compressed.safetensors").write_bytes(b"cut")
    with pytest.raises(LamellaError, match="broken"):
        Compressed.load(folder)
    manifest = json.loads((folder / "compression.json").read_text())
    (folder / "compression.json").write_text(json.dumps(manifest)[:-9])
    with pytest.raises(LamellaError, match="broken"):
        Compressed.load(folder)


def test_a_class_that_transformers_lacks_is_refused(tmp_path):
    model = FAMILIES["mixtral"]()
    model.__class__ = type("MyMixtral", (type(model),), {})
    with pytest.raises(LamellaError, match="MyMixtral"):
        compress(model, None, 0.5, method="random").save(tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_compressed_model_gives_its_experts_as_any_other():
    model = tiny_moe.build("qwen2_moe", dtype=torch.float64)
    smaller = compress(model, None, 0.75, method="random").model
    x = torch.randn(7, tiny_moe.HIDDEN, dtype=torch.float64)
    for layer in moe_layers(smaller):
        routing = layer.router(x)
        mixed = sum(
            weight[:, None] * torch.stack([layer.experts[int(e)](row) for e, row in zip(chosen, x, strict=True)])
            for weight, chosen in zip(routing.weights.T, routing.indices.T, strict=True)
        )
        torch.testing.assert_close(layer.module(x[None])[0], mixed + layer.shared(x))
