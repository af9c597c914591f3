"""Two processes, each with half the rows, make the step that one process makes by accumulating the two halves."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from tests import tiny
from tests.tuners.data_parallel_step import step

ROOT = Path(__file__).parents[2]


NAMES = ["mola-llama", "mola-llama-smoothed", "mola-bert", "molex-llama", "molex-bert"]


def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    # `accelerate launch --cpu` would silently start one process; the program asserts that there are two.
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "tests.tuners.data_parallel_step", str(tmp_path), *NAMES],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
             "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    for name in NAMES:
        actual = load_file(tmp_path / f"{name}.safetensors")
        assert any("router" in key for key in actual)
        tiny.assert_same(actual, step(tmp_path, name, copies=2, processes=1))
