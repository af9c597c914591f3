import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from lamella.lab.runs.trained import load_trained
from lamella.lab.scoring import score
from lamella.tracing import record_routing

SCRIPT = """
import hashlib, json, sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from lamella.lab.runs import run as module
from lamella.lab.runs.settings import RunSettings

model = []
build = module._Run.__init__
def kept(self, *args):
    build(self, *args)
    model.append(self.model)
module._Run.__init__ = kept

result = module.train(RunSettings.parse(json.loads(sys.argv[1])), sys.argv[2])
digest = hashlib.sha256()
for name, parameter in sorted(model[0].named_parameters()):
    if parameter.requires_grad:
        digest.update(parameter.detach().numpy().tobytes())
rank = dist.get_rank()
with open(f"{sys.argv[2]}-rank{rank}.json", "w") as file:
    json.dump({"world": dist.get_world_size(), "checksum": digest.hexdigest(), "metrics": result.metrics}, file)
"""

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


@pytest.mark.parametrize(
    "launcher", [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.heavy)], ids=["torchrun", "accelerate"]
)
def test_two_processes_train_one_model(bert, questions, tmp_path, launcher):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    settings = {
        "model": bert,
        "task": questions,
        "method": {"name": "mola", "r": 2, "num_experts": 2},
        "batch_size": 4,
        "max_steps": 4,
        "max_length": 32,
        "evaluate_every": 2,
        "log_every": 2,
    }
    paths = os.pathsep.join(map(str, (Path.cwd() / "src", Path.cwd())))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    if launcher is ACCELERATE:
        launcher = [*launcher, "--main_process_port", "0"]
    command = [*launcher, str(script), json.dumps(settings), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    first, second = (json.loads((tmp_path / f"run-rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    assert first["checksum"] == second["checksum"]
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["processes"] == 2
    assert first["metrics"]["saved_equals_loaded"]["equal"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("finished") == 1

    kept = pd.read_parquet(tmp_path / "run" / "trace.parquet")
    with record_routing((trained := load_trained(tmp_path / "run")).model) as alone:
        for split in ("validation", "test"):
            rows, encoded = trained.rows(split, None)
            score(trained.model, trained.task, rows, encoded.collator, batch_size=4)
    pd.testing.assert_frame_equal(kept, alone.frame)
    history = pd.read_parquet(tmp_path / "run" / "routing.parquet")
    assert (history.groupby("step")["tokens"].first() > 4 * 4).all()  # more than the four rows of one process have
