import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from tests.processes import run_on_two

from lamella.lab.runs import run
from lamella.lab.runs.settings import RunSettings
from lamella.lab.runs.trained import load_trained
from lamella.lab.scoring import score
from lamella.tracing import record_routing

SCRIPT = """
import json, sys
from tests.lab.studies.test_parallel import train_here

train_here(json.loads(sys.argv[1]), sys.argv[2])
"""

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--main_process_port", "0"]


def train_here(settings, folder):
    """What each of the processes does; it writes down what it has trained and found."""
    torch.set_num_threads(1)
    model, build = [], run._Run.__init__

    def kept(self, *args, **given):
        build(self, *args, **given)
        model.append(self.model)

    run._Run.__init__ = kept
    metrics = run.train(RunSettings.parse(settings), folder).metrics
    digest = hashlib.sha256()
    for _, parameter in sorted(model[0].named_parameters()):
        if parameter.requires_grad:
            digest.update(parameter.detach().numpy().tobytes())
    found = {"world": dist.get_world_size(), "checksum": digest.hexdigest(), "metrics": metrics}
    Path(f"{folder}-rank{dist.get_rank()}.json").write_text(json.dumps(found))


def launch(launcher, folder, *words):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join(map(str, (Path.cwd() / "src", Path.cwd())))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([*launcher, script, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "launcher",
    [None, pytest.param(TORCHRUN, marks=pytest.mark.heavy), pytest.param(ACCELERATE, marks=pytest.mark.heavy)],
    ids=["forked", "torchrun", "accelerate"],
)
def test_two_processes_train_one_model(fresh, bert, questions, tmp_path, launcher):
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
    if launcher is None:
        run_on_two(fresh, train_here, settings, str(tmp_path / "run"))
    else:
        launch(launcher, tmp_path, json.dumps(settings), str(tmp_path / "run"))

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
