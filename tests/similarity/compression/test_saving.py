import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny_moe
from tests.pairwise import pairwise
from tests.processes import run_fresh
from tests.similarity.compression.planted import aligners, captured, logits, same_state, state, texts_of
from tests.similarity.compression.test_compression import model_of
from tests.tiny_moe import FAMILIES, PATHS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from lamella import MolaConfig, MolexConfig
from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.similarity.activations.manifest import model_fingerprint
from lamella.similarity.compression import Compressed, compress, saving
from lamella.similarity.compression.pool import AlignedExpert


def small(family="qwen2_moe", criterion="m-smoe", budget=0.5, dtype=torch.float32, **settings):
    """By default experts that share storage; dropped ones where the criterion drops."""
    model = model_of(family, dtype=dtype)
    settings = {"scope": "layer", "refit": False, **settings}
    return compress(model, captured(model), budget, criterion=criterion, texts=texts_of(model), **settings)


@pytest.mark.parametrize(
    ("family", "criterion", "scope"),
    pairwise(PATHS, ("reap", "ream", "m-smoe", "mean"), ("layer", "model")),
)
def test_what_is_loaded_is_what_was_saved(tmp_path, family, criterion, scope):
    saved = small(family, criterion, 0.75, scope=scope, refit=True)
    saved.save(tmp_path / "small")
    loaded = Compressed.load(tmp_path / "small")
    assert loaded.report == saved.report
    assert same_state(loaded.model, state(saved.model))
    assert torch.equal(logits(loaded.model), logits(saved.model))
    assert sum(p.numel() for p in loaded.model.parameters()) == saved.report.parameters
    assert not loaded.model.training
    uniform = len({len(kept) for kept in saved.report.kept.values()}) == 1
    assert (tmp_path / "small" / "model.safetensors").exists() == (saved.report.cut and uniform)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "switch_transformers", "deepseek_v3"])
def test_transformers_alone_opens_a_model_of_which_every_layer_lost_as_many(tmp_path, family):
    saved = small(family, "reap", 0.75 if family != "deepseek_v3" else 0.5, refit=True)
    saved.save(tmp_path / "small")
    kind = AutoModelForSeq2SeqLM if saved.model.config.is_encoder_decoder else AutoModelForCausalLM
    alone = kind.from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(logits(alone), logits(saved.model), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in alone.parameters()) == saved.report.parameters
    assert model_fingerprint(alone) != model_fingerprint(model_of(family))


@pytest.mark.parametrize("kind", ["linear", "low-rank", "layernorm"])
def test_experts_behind_aligners_as_the_first_edition_stored_them_are_loaded(tmp_path, kind):
    saved = small(dtype=torch.float64)
    pool = moe_layers(saved.model)[1].experts_module
    (aligner,) = aligners(kind, [((1, 0), (1, 1))]).values()
    pool.stored.append(AlignedExpert(aligner, pool.stored[0]))
    pool.places[0] = len(pool.stored) - 1
    saved.save(tmp_path / "small")
    loaded = Compressed.load(tmp_path / "small")
    assert torch.equal(logits(loaded.model), logits(saved.model))


def load_again(folder):
    save_file({"logits": logits(Compressed.load(folder).model)}, folder.parent / "logits.safetensors")


# an ordinary checkpoint holds no rounded frequencies: transformers computes those anew
@pytest.mark.parametrize(("criterion", "dtype"), [("m-smoe", torch.bfloat16), ("reap", torch.float32)])
def test_a_fresh_process_loads_it_bit_for_bit(fresh, tmp_path, criterion, dtype):
    saved = small(dtype=dtype, criterion=criterion)
    saved.save(tmp_path / "small")
    run_fresh(fresh, load_again, tmp_path / "small")
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(saved.model))


@pytest.mark.parametrize("tied", [False, True])
def test_the_file_holds_each_number_once(tmp_path, tied):
    model = FAMILIES["mixtral"](tie_word_embeddings=tied)
    saved = compress(model, captured(model), 0.5, criterion="m-smoe", scope="layer")
    saved.save(tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "compressed.safetensors")
    parameters = dict(saved.model.named_parameters())
    assert sum(tensors[name].numel() for name in parameters) == saved.report.parameters
    buffers = dict(saved.model.named_buffers())
    assert tensors.keys() == parameters.keys() | buffers.keys()
    loaded = Compressed.load(tmp_path / "small").model
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied


ATTENTION = LoraConfig(target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("config", "criterion"), [(MolaConfig(target_modules=["q_proj"]), "reap"), (MolexConfig(lora=ATTENTION), "m-smoe")]
)
def test_an_adapter_of_a_smaller_model_is_refused_on_another(tmp_path, config, criterion):
    """Its tensors would fit: the attention is the same."""
    saved = small(criterion=criterion)
    saved.save(tmp_path / "small")
    get_peft_model(saved.model, config).save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(Compressed.load(tmp_path / "small").model, tmp_path / "adapter")
    assert again.peft_config["default"].base_experts == saved.model.config.lamella_compressed
    for other, said in ((model_of("qwen2_moe"), "has all its experts"), (small(budget=0.75).model, "has 9 of 12")):
        with pytest.raises(LamellaError, match=f"trained on a model with 6 of 12 experts.*{said}"):
            PeftModel.from_pretrained(other, tmp_path / "adapter")
    get_peft_model(model_of("qwen2_moe"), config)  # the settings are not bound to a model


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
        compress(model, captured(model), 0.5, criterion="reap", scope="layer").save(tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_compressed_model_gives_its_experts_as_any_other():
    model = tiny_moe.build("qwen2_moe", dtype=torch.float64)
    smaller = compress(model, captured(model), 0.75, criterion="m-smoe", scope="layer").model
    x = torch.randn(7, tiny_moe.HIDDEN, dtype=torch.float64)
    for layer in moe_layers(smaller):
        routing = layer.router(x)
        mixed = sum(
            weight[:, None] * torch.stack([layer.experts[int(e)](row) for e, row in zip(chosen, x, strict=True)])
            for weight, chosen in zip(routing.weights.T, routing.indices.T, strict=True)
        )
        torch.testing.assert_close(layer.module(x[None])[0], mixed + layer.shared(x))
