import pytest
import torch
from tests.lab.tiny_runs import tiny_settings

from lamella.errors import LamellaError
from lamella.lab.data import load_backbone
from lamella.lab.runs.plain_text import PlainText, plain_text_sentence
from lamella.lab.runs.run import train


def test_a_run_says_what_it_forgot_of_the_base(llama, prose, questions, tmp_path):
    settings = tiny_settings(llama, f"text:{questions}", "lora", max_steps=3, keep="last", plain_text=prose, limit=8)

    said = train(settings, tmp_path / "run").metrics["plain_text"]

    assert said["rows"] == 12
    assert said["after"] - said["before"] == pytest.approx(said["rise"])
    assert said["interval"][0] <= said["rise"] <= said["interval"][1]
    assert said["rise"] != 0.0


def test_the_base_is_the_model_without_its_adapter(llama, prose, finished_run):
    backbone = load_backbone(llama)
    text = PlainText(tiny_settings(llama, prose), prose, backbone)
    adapted = finished_run("lora", decoder=True).model
    text.measure_base(adapted)
    with torch.no_grad():
        bare = text.measured(backbone.model)
    assert bare["rise"] == pytest.approx(0.0, abs=1e-6)
    assert "the base" in plain_text_sentence(bare)
    assert text.measured(adapted)["rise"] != 0.0


def test_an_encoder_has_no_loss_on_plain_text(bert, prose):
    with pytest.raises(LamellaError, match="it needs a decoder"):
        PlainText(tiny_settings(bert, prose), prose, load_backbone(bert))
