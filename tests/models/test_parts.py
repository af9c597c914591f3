"""What models are made of: texts, tokenizer, floors, optimizer, training, and what is kept."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lab.tiny_runs import sentences
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from lamella.errors import LamellaError
from models import corpus
from models.building import Made, keep, refuse_existing
from models.corpus import END, documents, token_blocks, train_tokenizer
from models.fitting import fit
from models.muon import Muon
from models.scores import Bigrams, expert_shares, model_nll, perplexities, routers_balance, smallest
from models.settings import Schedule

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def mixture(seed=0):
    torch.manual_seed(seed)
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    config = Qwen2MoeConfig(**SIZES, **moe, norm_topk_prob=True, router_aux_loss_coef=0.0)
    return Qwen2MoeForCausalLM(config)


def columns(rows=12, tokens=6, seed=0):
    blocks = torch.randint(0, 40, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": blocks, "labels": blocks}


# --- texts


@pytest.fixture
def texts(prose):
    return corpus.prose(prose)


def test_documents_of_two_splits_share_no_text(texts):
    train, test = documents(texts, "train", 10**6), documents(texts, "test", 10**6)

    assert len(train) == 40
    assert not set(train) & set(test)


def test_documents_stop_when_there_is_enough_and_stay_the_same(texts):
    some = documents(texts, "train", 100)

    assert 100 <= sum(map(len, some)) < 100 + max(map(len, some))
    assert some == documents(texts, "train", 10**6)[: len(some)]
    assert some != documents(texts, "train", 100, seed=1)


def test_a_statement_and_its_reply_are_one_document(tmp_path):
    for split, said in (("train", "then"), ("validation", "now"), ("test", "here")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": "where?\n", "completion": said}) + "\n")

    assert documents(corpus.prose(f"file:{tmp_path}"), "test", 100) == ["where?\nhere"]


def test_only_prose_makes_models(questions):
    with pytest.raises(LamellaError, match="classification task"):
        corpus.prose(questions)


def test_blocks_hold_the_texts_in_order_with_an_end_after_each():
    tokenizer = train_tokenizer(sentences(40, 0), 300)
    texts = ["who is she", "it is they going now"]
    ids = tokenizer(texts)["input_ids"]
    stream = [*ids[0], tokenizer.eos_token_id, *ids[1], tokenizer.eos_token_id]

    assert token_blocks(texts, tokenizer, 3).flatten().tolist() == stream[: len(stream) // 3 * 3]


def test_less_than_a_block_is_refused():
    with pytest.raises(LamellaError, match="less than one block"):
        token_blocks(["who"], train_tokenizer(["who is"], 258), 64)


def test_the_tokenizer_gives_back_every_text():
    tokenizer = train_tokenizer(sentences(40, 0), 300)

    for text in ("who is she", "Ωmega — 1,000\n\ttabs", " two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 300
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == END


# --- floors


def slow_bigram(blocks, before, after, vocabulary):
    """Witten and Bell's probability of one pair, counted by hand."""
    tokens = [token for block in blocks for token in block]
    unigram = (tokens.count(after) + 1) / (len(tokens) + vocabulary)
    followers = [second for block in blocks for first, second in itertools.pairwise(block) if first == before]
    n, t = len(followers), max(len(set(followers)), 1)
    return (followers.count(after) + t * unigram) / (n + t)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=4))
def test_bigrams_agree_with_counting_by_hand_and_sum_to_one(blocks):
    counted = Bigrams.of(torch.tensor(blocks), 5)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))  # (25, 2)
    found = counted.bigram_nll(pairs)[:, 0].neg().exp().view(5, 5)

    expected = [[slow_bigram(blocks, a, b, 5) for b in range(5)] for a in range(5)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(counted.unigram_nll(pairs)[:5, 0].neg().exp().sum(), torch.tensor(1.0).double())


def test_a_text_that_repeats_itself_is_easier_by_pairs():
    blocks = torch.tensor([[0, 1, 2, 3] * 4])
    counted = Bigrams.of(blocks, 4)

    assert counted.bigram_nll(blocks).mean() < 0.5 * counted.unigram_nll(blocks).mean()


# --- scores


def test_the_nll_is_the_models_own_loss():
    model, rows = LlamaForCausalLM(LlamaConfig(**SIZES)), columns(rows=40)
    with torch.no_grad():
        expected = model(**rows).loss.item()

    assert model_nll(model, rows).mean().item() == pytest.approx(expected, abs=1e-5)


def test_a_perplexity_of_all_weighs_every_token_alike():
    nll = {"short": torch.zeros(1, 2), "long": torch.full((3, 2), math.log(2.0))}

    found = perplexities(nll)
    assert found == pytest.approx({"short": 1.0, "long": 2.0, "all": 2 ** (6 / 8)})


def test_shares_are_those_of_the_routers_own_choices():
    model, rows = mixture(), columns(rows=20)
    counted = torch.zeros(2, 4)

    def count(at):
        def hook(_module, _inputs, output):
            counted[at] += torch.bincount(output[2].flatten(), minlength=4)

        return hook

    for at, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(count(at))
    shares = expert_shares(model, rows, top_k=2)

    torch.testing.assert_close(torch.tensor(shares).float(), counted / counted.sum(dim=1, keepdim=True))
    assert smallest(shares) == min(min(layer) for layer in shares)


def test_routers_that_collapsed_on_different_experts_are_not_balanced():
    to_first, to_second = torch.tensor([[9.0, 0.0]] * 4), torch.tensor([[0.0, 9.0]] * 4)

    assert routers_balance([to_first, to_second], top_k=1) > 3.9  # 2 each; balanced routers have 1 each


# --- optimizer


def test_muon_updates_each_expert_as_a_matrix_of_its_own():
    model = mixture()
    experts = model.model.layers[0].mlp.experts
    own = [nn.Parameter(half.clone()) for half in experts.gate_up_proj.data[1].chunk(2)]
    alone = torch.optim.Muon(own, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer = Muon(model, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**columns()).loss.backward()
        for half, gradient in zip(own, experts.gate_up_proj.grad[1].chunk(2), strict=True):
            half.grad = gradient.clone()
        optimizer.step()
        alone.step()

    torch.testing.assert_close(experts.gate_up_proj.data[1], torch.cat([half.data for half in own]))


def test_muon_moves_every_parameter_and_forgets_every_gradient():
    model = mixture()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = Muon(model, lr=0.01, weight_decay=0.0)
    model(**columns()).loss.backward()
    optimizer.step()

    still = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert not still
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_routers_embeddings_and_vectors_are_not_orthogonalised():
    model = mixture()
    optimizer = Muon(model, lr=0.01, weight_decay=0.1)
    by_adamw = {id(parameter) for group in optimizer.param_groups[1:] for parameter in group["params"]}

    names = {name for name, parameter in model.named_parameters() if id(parameter) in by_adamw}
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.gate.weight", "model.norm.weight"} <= names
    assert not any("experts." in name or "o_proj.weight" in name for name in names)


# --- training


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_fit_learns_and_logs_the_loss_without_what_routers_pay(optimizer):
    model, rows = mixture(), columns(rows=16)
    schedule = Schedule(optimizer=optimizer, lr=1e-2, batch_size=8, epochs=15, log_every=10)
    before = model_nll(model, rows).mean().item()

    curve = fit(model, rows, schedule, seed=0, balance=lambda *_: torch.tensor(1000.0), watch=lambda: {"seen": 1.0})
    assert model_nll(model, rows).mean().item() < before - 0.5
    assert [entry["step"] for entry in curve] == [10.0, 20.0, 30.0]
    assert all(entry["loss"] < 10 and entry["seen"] == 1.0 for entry in curve)


@pytest.mark.parametrize("coef", [0.0, 10.0])
def test_what_routers_pay_reaches_them(coef):
    model, rows = mixture(), columns(rows=16)

    def paid(outputs, _):
        return coef * routers_balance(outputs.router_logits, 2)

    def owed():
        with torch.no_grad():
            return routers_balance(model(**rows, output_router_logits=True).router_logits, 2).item()

    model.model.embed_tokens.weight.data += 0.2  # what all tokens have in common, and expert 0 of each layer likes
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[0] += 0.5
    before = owed()
    fit(model, rows, Schedule(lr=1e-2, batch_size=8, epochs=15), seed=0, balance=paid)
    assert (owed() < before - 0.5) == (coef > 0)


def test_the_same_seed_gives_the_same_model():
    schedule = Schedule(lr=1e-2, batch_size=4)
    models = [mixture(), mixture(), mixture()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        fit(model, columns(rows=16), schedule, seed=seed)
    first, same, other = (model.model.layers[0].mlp.experts.down_proj for model in models)

    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# --- keeping


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    schedule = Schedule(lr=0.1, batch_size=1)
    tokenizer = train_tokenizer(["who"], 258)
    made = Made(mixture(), tokenizer, {"seconds": {}}, ["It is bad."], {"more.json": [1]})
    log = keep(made, "made", schedule, tmp_path / "model")

    assert json.loads((tmp_path / "model" / "log.json").read_text()) == log
    assert log["failed"] == ["It is bad."]
    assert json.loads((tmp_path / "model" / "more.json").read_text()) == [1]
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        keep(made, "made", schedule, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_never_replaced_unasked(tmp_path):
    with pytest.raises(LamellaError, match="--force"):
        refuse_existing(tmp_path, force=False)
    refuse_existing(tmp_path, force=True)
    refuse_existing(tmp_path / "new", force=False)
