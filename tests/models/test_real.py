"""The recipes on the real assets, as far as minutes allow, and the model that is kept in the package."""

import json
from pathlib import Path

import pytest
import torch

from lamella.lab.data import load_backbone
from models.corpus import documents, prose, token_blocks
from models.scores import expert_shares, model_nll, perplexities, smallest
from models.upcycling import last_layers, states_before, upcycled

pytestmark = pytest.mark.real
KINDS = ("news", "dialogue", "glosses", "technical")


def test_upcycled_smollm2_is_smollm2():
    backbone = load_backbone("smollm2")
    model = backbone.model.requires_grad_(False).eval()
    mixture = upcycled(model, 6, 8, 2)
    ids = token_blocks(documents(prose("news"), "test", 1000), backbone.tokenizer, 16)[:2]
    expected = model(ids).logits

    torch.testing.assert_close(mixture(ids).logits, expected, atol=2e-4, rtol=0)
    last = last_layers(mixture, 6)(inputs_embeds=states_before(mixture, 6, ids)).logits
    torch.testing.assert_close(last, expected, atol=2e-4, rtol=0)


@pytest.mark.heavy  # a minute: all held-out texts
def test_the_packaged_tiny_moe_is_what_its_log_says():
    backbone = load_backbone("tiny-moe")
    log = json.loads((Path(backbone.path) / "log.json").read_text())
    settings, blocks = log["settings"], {}
    for kind in KINDS:
        texts = documents(prose(kind), "test", settings["held_out_characters"])
        blocks[kind] = token_blocks(texts, backbone.tokenizer, settings["block"])
    rows = {kind: {"input_ids": ids, "labels": ids} for kind, ids in blocks.items()}
    found = perplexities({kind: model_nll(backbone.model, columns) for kind, columns in rows.items()})
    joined = torch.cat(list(blocks.values()))
    shares = expert_shares(backbone.model, {"input_ids": joined, "labels": joined}, settings["top_k"])

    assert log["failed"] == []
    assert found == pytest.approx(log["test_perplexity"]["mixture"], rel=1e-3)
    assert found["all"] < log["test_perplexity"]["bigram"]["all"]
    assert found["all"] <= log["test_perplexity"]["dense"]["all"]
    assert smallest(shares) > 0.02
