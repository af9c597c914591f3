"""The recipes, in miniature: a folder that transformers loads, with figures on text that was held out."""

import json
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from lamella.errors import LamellaError
from lamella.lab.data import load_task
from models import corpus
from models.command import MODELS, RECIPES, STAGED, build, main
from models.corpus import documents, token_blocks, train_tokenizer
from models.scores import model_nll, perplexities
from models.switch import label_tokens

SMALL = ["vocabulary=280", "block=16", "hidden=16", "heads=2", "experts=4", "expert_width=8", "shared_width=8"]
SWITCH = ["vocabulary=300", "max_length=16", "hidden=16", "heads=2", "experts=4", "expert_width=16"]


def tiny_moe(folder, prose, *changes, **options):
    words = [f"kinds=[{prose!r}]", *SMALL, "layers=2", "characters=10000", "held_out_characters=10000"]
    return build("tiny-moe", folder, [*words, "schedule.log_every=2", *changes], **options)


def smollm2_experts(folder, llama, prose, *changes):
    words = [f"model={llama!r}", f"kinds=[{prose!r}]", "layers=1", "block=8", "blocks=6", "held_out_blocks=4"]
    quick = ["experts.bf16=false", "routers.bf16=false", "experts.log_every=1", "routers.log_every=1"]
    return build("smollm2-experts", folder, [*words, *quick, *changes])


@pytest.fixture(scope="session")
def tiny(prose, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return folder, tiny_moe(folder, prose)


def test_every_model_has_a_recipe():
    assert {path.stem for path in RECIPES.iterdir()} == {*MODELS, *STAGED}


def test_tiny_moe_loads_and_its_figures_are_those_of_the_kept_weights(tiny, prose):
    folder, log = tiny
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert json.loads((folder / "log.json").read_text()) == log
    assert model.config.num_experts == 4
    assert model.config.use_cache
    assert len(log["shares"]) == 2
    assert log["active_parameters"]["mixture"] == pytest.approx(log["active_parameters"]["dense"], rel=0.05)
    assert set(log["test_perplexity"]) == {"unigram", "bigram", "mixture", "dense"}
    blocks = token_blocks(documents(corpus.prose(prose), "test", 10**6), tokenizer, 16)
    assert blocks.numel() == log["test_tokens"][prose]
    found = perplexities({"test": model_nll(model, {"input_ids": blocks, "labels": blocks})})
    assert found["all"] == pytest.approx(log["test_perplexity"]["mixture"]["all"], rel=1e-4)


def test_one_seed_makes_one_model(tiny, prose, tmp_path):
    assert tiny_moe(tmp_path / "again", prose)["test_perplexity"] == tiny[1]["test_perplexity"]


def test_a_model_that_is_not_what_it_promises_says_so_and_replaces_another_only_when_told(prose, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    words = [f"kinds=[{prose!r}]", *SMALL, "layers=1", "characters=10000", "held_out_characters=10000"]
    words = ["tiny-moe", *words, "schedule.lr=1e-6", "smallest_share=0.9", "-o", str(folder)]
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert (folder / "mine.txt").read_text() == "kept"
    assert main([*words, "--force"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "test perplexity of dense" in said
    assert "the bigram floor has" in said
    assert "starved" in said
    assert not (folder / "mine.txt").exists()


def test_unknown_models_and_settings_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["huge-moe"])
    assert "huge-moe" in capsys.readouterr().err
    assert main(["tiny-moe", "expert=3", "-o", str(tmp_path / "x")]) == 2
    assert "Did you mean 'experts'" in capsys.readouterr().err


def test_smollm2_experts_are_trained_apart(llama, prose, tmp_path):
    log = smollm2_experts(tmp_path / "model", llama, prose)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    truth = json.loads((tmp_path / "model" / "ground_truth.json").read_text())

    assert truth == {"layers": [1], "experts": [{"expert": half, "kind": prose, "half": half} for half in (0, 1)]}
    assert log["untrained_logit_difference"] < 1e-4
    assert set(log["test_perplexity"]) == {"dense", f"{prose} 0", f"{prose} 1", "mixture"}
    assert len(log["shares"]) == 1
    first, second = model.model.layers[1].mlp.experts.down_proj
    start = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).model.layers[1].mlp.down_proj.weight
    assert not torch.equal(first, second)
    assert not torch.equal(first, start.to(torch.bfloat16).float())
    # all that is not an expert or a router is the dense model's, but for bfloat16
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).state_dict()
    kept = model.to(torch.bfloat16).state_dict()
    for name in set(dense) & set(kept):
        assert torch.equal(dense[name], kept[name]), name


def test_too_little_prose_is_an_error(llama, prose, tmp_path):
    with pytest.raises(LamellaError, match="Ask for fewer"):
        smollm2_experts(tmp_path / "model", llama, prose, "blocks=4000")
    assert not (tmp_path / "model").exists()


def test_switch_says_a_label_as_one_token(questions, tmp_path):
    changes = [
        f"task={questions!r}",
        *SWITCH,
        "layers=4",
        "sparse_layers=2",
        "schedule.epochs=2",
        "schedule.log_every=5",
    ]
    log = build("switch-trec", tmp_path / "model", changes)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    test = load_task(questions).splits["test"]

    labels = torch.tensor(list(log["label_tokens"].values()))
    texts = tokenizer(list(test["text"]), padding=True, return_tensors="pt")
    start = torch.full((len(test), 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        logits = model(**texts, decoder_input_ids=start).logits[:, 0, labels]
    accuracy = (logits.argmax(dim=-1) == torch.tensor(test["label"])).double().mean().item()
    assert accuracy == log["test_accuracy"]["model"]
    assert {"floor (TF-IDF)", "floor (majority)"} < set(log["test_accuracy"])
    assert len(log["shares"]) == 3  # two encoder blocks and the decoder's one
    assert [sum(layer) for layer in log["shares"]] == pytest.approx([1.0] * 3)  # nothing dropped


def test_label_tokens_are_new_and_whole(questions):
    task, tokenizer = load_task(questions), train_tokenizer(["who is"], 260)
    size = len(tokenizer)
    ids = label_tokens(task, tokenizer)

    assert ids.tolist() == [size, size + 1]
    assert tokenizer(f"<|{task.label_names[1]}|>")["input_ids"] == [size + 1]


def test_switch_needs_a_classification_task(prose, tmp_path):
    with pytest.raises(LamellaError, match="causal-lm task"):
        build("switch-trec", tmp_path / "model", [f"task={prose!r}"])


def test_ctrl_c_is_a_sentence_and_status_130(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("models.command.build", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        main(["tiny-moe", "-o", str(tmp_path / "made")])
    assert end.value.code == 130
    said = " ".join(capsys.readouterr().err.split())
    assert said == f"Interrupted: {tmp_path / 'made'} was not written, and the same command begins anew."
