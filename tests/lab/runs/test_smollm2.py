"""A real decoder, end to end: SmolLM2-135M with MoLA on news prose."""

import pytest
import torch
from peft import PeftModel

from lamella.lab.data import load_backbone
from lamella.lab.runs.run import train
from lamella.lab.runs.settings import resolve
from lamella.tuners.mola import MolaLinear

PROMPT = "The government said on Tuesday that"


def generate(model, tokenizer, use_cache: bool) -> list[int]:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache)[0].tolist()


@pytest.mark.heavy  # half a minute; tiny decoders take the same way by default
@pytest.mark.real
def test_perplexity_falls_and_a_cache_writes_the_same_text(tmp_path):
    settings = resolve(
        "smollm2-news",
        max_steps=4,
        batch_size=2,
        max_length=32,
        evaluate_every=4,
        keep="last",
        limit={"train": 8, "validation": 1, "test": 2},
        threads=1,
    )
    result = train(settings, tmp_path / "run")
    before, after = result.metrics["before"]["test"]["perplexity"], result.metrics["test"]["perplexity"]
    assert after < before
    assert result.metrics["saved_equals_loaded"]["equal"]

    backbone = load_backbone("smollm2")
    model = PeftModel.from_pretrained(backbone.model, tmp_path / "run" / "adapter").eval()
    depths = {layer.place.layer: layer.experts["default"].num_experts for layer in model.modules() if is_mola(layer)}
    assert len(depths) == 30
    assert sum(depths.values()) == 148  # 2-4-6-8 over 30 blocks
    text = generate(model, backbone.tokenizer, use_cache=True)
    assert text == generate(model, backbone.tokenizer, use_cache=False)


def is_mola(module: torch.nn.Module) -> bool:
    return isinstance(module, MolaLinear)
