"""`lamella probe` on a tiny model and rows from a file."""

import json

import pandas as pd
import pytest
import torch
from tests.lab.tiny_runs import MOLEX

from lamella.backbones import mean_states
from lamella.lab.data import load_backbone
from lamella.texts import text_batches


@pytest.fixture(scope="module")
def rows(sentences, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = zip(sentences.texts, sentences.classes, strict=True)
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    return f"file:{path}"


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_states_are_the_means_over_each_text_alone(name, request):
    backbone = load_backbone(request.getfixturevalue(name))
    model = backbone.model.eval()
    texts = ["who is she", "where are they going now then", "it is here"]
    batches = text_batches(texts, backbone.tokenizer)
    stack = "encoder.layer" if name == "bert" else "model.layers"
    found = mean_states(model, stack, batches)
    assert found.shape == (3, 3, 32)
    for at, row in enumerate(batches.rows):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
        for layer, state in enumerate(states[: 3 if name == "bert" else 2]):  # Llama's last one is normed
            torch.testing.assert_close(found[layer, at].float(), state[0].mean(dim=0), atol=1e-5, rtol=1e-5)


def test_the_command_probes_and_reports_what_it_found(lamella, bert, rows, tmp_path):
    folder = tmp_path / "probe"
    status, out, _ = lamella("probe", bert, "--text", rows, "--rows", "100", "-o", folder)
    assert status == 0
    assert "Class (semantic) is most selective behind" in out
    table = pd.read_parquet(folder / "results.parquet")
    assert [layers.tolist() for _, layers in table.groupby("property")["layer"]] == [[-1, 0, 1]] * 5
    assert json.loads((folder / "probe.json").read_text())["text"]["sentences"] == 200
    page = (folder / "report.html").read_text()
    assert "What follows, and what does not" in page
    assert "Picks" not in page
    assert not (folder / "picks.parquet").exists()


def test_with_a_run_its_picks_stand_beside_random_ones(lamella, bert, rows, finished_run, tmp_path):
    run = finished_run(MOLEX).folder.path
    status, out, _ = lamella("probe", bert, "--run", run, "--text", rows, "--rows", "60", "-o", tmp_path, "--json")
    assert status == 0
    printed = json.loads(out)
    assert sum(printed["picks"]) == pytest.approx(1.0)
    assert {row["measure"] for row in printed["correlations"]} == {"selectivity", "accuracy", "control"}
    assert len(pd.read_parquet(tmp_path / "picks.parquet")) == 4
    page = (tmp_path / "report.html").read_text()
    assert "random picks, 95 %" in page
    assert 'href="#picks"' in page


def test_what_cannot_be_probed_is_a_paragraph(lamella, bert, rows, finished_run, run_folder):
    for words, message in (
        (["--rows", "5"], "too few to probe for anything"),
        (["--run", finished_run("lora").folder.path], "is a run of lora, and only MoLEx"),
    ):
        status, _, err = lamella("probe", bert, "--text", rows, *words, "-o", run_folder)
        assert status == 2
        assert message in " ".join(err.split())
        assert not run_folder.exists()
