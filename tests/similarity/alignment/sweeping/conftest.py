from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.tiny_moe import VOCAB, build
from transformers import AutoModelForCausalLM

from lamella.similarity.activations import Capture, capture


@dataclass
class Study:
    model: Path
    capture: Capture
    load: object


def documents(count, length=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for start in range(0, count, 8):
        yield {
            "input_ids": torch.randint(3, VOCAB, (8, length), generator=draw),
            "rows": torch.arange(start, start + 8),
        }


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """A tiny model on disk and a capture of it: three layers of four experts."""
    folder = tmp_path_factory.mktemp("study")
    model = build("qwen2_moe", moe_intermediate_size=8)
    model.save_pretrained(folder / "model")

    # made inside, so that another process gets it by value
    def load(name, dtype):
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()

    return Study(folder / "model", capture(model, documents(40), folder / "capture", per_expert=64), load)
