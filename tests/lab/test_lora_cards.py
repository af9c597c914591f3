"""What a run leaves beside the LoRA that it trained, so that a library retrieves it by its training rows."""

import json

import pytest
import torch
from tests.lab.tiny_runs import MOLA, tiny_settings

from lamella import AdapterLibrary, MoleConfig, compose
from lamella.adapters.card import CARD, read_card
from lamella.errors import LamellaError
from lamella.lab.data import encode, load_backbone, load_task
from lamella.lab.lora_cards import measure_card
from lamella.lab.runs import run as run_module
from lamella.lab.runs.run import train
from lamella.retrieval import mean_inputs

QUERY = "bert.encoder.layer.0.attention.self.query"


def test_a_run_of_lora_leaves_a_card_of_its_task_without_a_row_of_it(finished_run, bert, questions):
    place = finished_run("lora").folder.path
    read, task = read_card(place / "adapter" / CARD), load_task(questions)
    assert read.task == "file:questions"
    assert read.labels == task.label_names
    assert read.base == json.loads((place / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (
        f"card: one pass of the base over {read.rows} of {read.rows} training rows took"
        in (place / "log.txt").read_text()
    )
    assert read.rows == len(task.splits["train"])

    backbone = load_backbone(bert, task)
    encoded = encode(task, backbone.tokenizer, max_length=32)
    expected = mean_inputs(backbone.model, [QUERY], [[encoded.collator(list(encoded.train))]])
    torch.testing.assert_close(read.centroids[QUERY], expected.centroids[QUERY], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(read.texts, expected.texts, rtol=1e-3, atol=1e-3)
    written = (place / "adapter" / CARD).read_text()
    assert not any(row["text"] in written for row in task.splits["train"])

    library = AdapterLibrary({"own": place / "adapter", "again": place / "adapter"})
    assert library["own"].task == "file:questions"
    assert not library.cards_left_out
    compose(backbone.model, library, MoleConfig(shortlist=1, retrieval="centroids"))


def test_of_prose_a_decoder_reads_whole_rows_as_a_prompt_would_be(finished_run, llama, prose):
    read = read_card(finished_run("lora", decoder=True).folder.path / "adapter" / CARD)
    task, backbone = load_task(prose), load_backbone(llama)
    rows = list(encode(task, backbone.tokenizer, max_length=32, decoder=True).train)
    embed = backbone.model.get_input_embeddings()
    with torch.no_grad():
        texts = torch.stack([embed(torch.tensor(row["input_ids"])).mean(dim=0) for row in rows]).mean(dim=0)
    assert (read.labels, read.rows) == ((), len(rows))
    torch.testing.assert_close(read.texts[0], texts, rtol=1e-3, atol=1e-3)
    assert "model.layers.1.self_attn.v_proj" in read.centroids


@pytest.mark.parametrize("method", [MOLA, "head", "full"])
def test_what_is_no_lora_has_none(finished_run, method):
    assert not list(finished_run(method).folder.path.rglob(CARD))


def test_rows_are_bounded_and_each_of_several_tasks_has_centroids_of_its_own(bert, questions, pairs, monkeypatch):
    monkeypatch.setattr("lamella.lab.lora_cards._ROWS", 8)
    task = load_task(f"joint:{questions}+{pairs}")
    backbone = load_backbone(bert, task)
    encoded = encode(task, backbone.tokenizer, max_length=32)
    told = []
    card = measure_card(
        backbone.model, {QUERY: "query of the LoRA"}, task, encoded.train, encoded.collator, "base", told.append
    )
    assert card.rows == 16
    assert card.centroids["query of the LoRA"].shape[0] == card.texts.shape[0] == 2
    assert "16 of" in told[0]


def test_a_base_that_cannot_be_read_so_costs_a_run_its_card_alone(bert, questions, run_folder, monkeypatch):
    def refuse(*_):
        raise LamellaError("nothing says where its blocks are.")

    monkeypatch.setattr(run_module, "measure_card", refuse)
    result = train(tiny_settings(bert, questions, "lora", max_steps=2, evaluate_every=2), run_folder)
    assert not (run_folder / "adapter" / CARD).exists()
    assert (
        "no lamella_card.json was written: nothing says where its blocks are." in (run_folder / "log.txt").read_text()
    )
    assert result.metrics["steps"] == 2
