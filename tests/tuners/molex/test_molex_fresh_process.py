import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests import tiny


def test_a_new_process_loads_the_very_same_model_of_every_path(tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for name in tiny.PATHS:
        tiny.build(name).save_pretrained(tmp_path / name / "base")
        model = tiny.molex(type(tiny.build(name)).from_pretrained(tmp_path / name / "base"), top_k=2)
        model.save_pretrained(tmp_path / name / "adapter")
        given = tiny.inputs(model.get_base_model())
        save_file(given, tmp_path / name / "given.safetensors")
        with torch.no_grad():
            expected[name] = model(**given).logits
        if model.get_base_model().can_generate():
            start = {key: value for key, value in given.items() if not key.startswith("decoder_")}
            said = model.generate(**start, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            expected[f"{name} says"] = said
    program = Path(__file__).with_name("fresh_molex.py")
    run = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == expected.keys()
    assert sum("says" in name for name in found) == 4
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
