import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests import tiny


def test_a_new_process_loads_the_very_same_model(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "llama")
    tiny.llama_classifier().save_pretrained(tmp_path / "classifier")
    model = tiny.adapted(type(tiny.llama()).from_pretrained(tmp_path / "llama"), num_experts=[2, 5])
    head = tiny.adapted(
        type(tiny.llama_classifier()).from_pretrained(tmp_path / "classifier"), router="cosine", task_type="SEQ_CLS"
    )
    with torch.no_grad():
        head.get_base_model().score.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path / "adapter")
    head.save_pretrained(tmp_path / "head")
    given = tiny.inputs(model.get_base_model())
    save_file(given, tmp_path / "given.safetensors")
    with torch.no_grad():
        logits, classes = model.eval()(**given).logits, head.eval()(**given).logits

    program = Path(__file__).with_name("fresh_process.py")
    run = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")
    assert found["config"].tolist() == [2, 5]
    assert not torch.equal(found["base"], logits)
    for way in ("peft", "auto", "transformers"):
        assert torch.equal(found[way], logits), way
    assert torch.equal(found["classifier"], classes)
