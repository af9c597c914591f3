"""PEFT's own tests of custom models and decoders, with lamella's methods where they have LoRA (opt-in: minutes).

``pytest -m heavy -s tests/peft_own`` prints the counts. PEFT's source archive is fetched with pip for the run, unless
PEFT_SOURCE names a folder that holds it unpacked.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import peft
import pytest
from tests.peft_own.substitution import CONFIGS, write_stand_ins

pytestmark = pytest.mark.heavy
HERE = Path(__file__).parent

# Failures that are no refusal of lamella's, by test, and why each is none of its faults.
_OWN_NAMES = "the LoRA inside the blocks is trained too, and keeps PEFT's names"
EXPLAINED: dict[str, dict[str, str]] = {
    "mola": {},
    "molex": {
        "test_in_features_out_features_exposed": "a block is no linear layer",
        "test_only_params_are_updated": _OWN_NAMES,
        "test_save_pretrained": "the two blocks have a config, without a name that the card could say",
        "test_save_pretrained_pickle": "as before",
        "test_training_custom_models": _OWN_NAMES,
        "test_training_decoders": _OWN_NAMES,
        "test_training_decoders_gradient_checkpointing": _OWN_NAMES,
        "test_training_decoders_layer_indexing": _OWN_NAMES,
    },
    "mole": {
        "test_disable_adapters": "a new composition is the mean of its LoRAs, and not the base",
        "test_only_params_are_updated": "the LoRAs are frozen, and belong to the method",
        "test_training_decoders_gradient_checkpointing/tiny-random-OPT": "squares behind a norm have a constant sum, "
        "so that the gradients are rounding, 1e-8 or exactly 0",
    },
}


def _is_explained(name: str, tuner: str) -> bool:
    """Whether a test is among the explained, by its name or, after a slash, for some of its cases alone."""
    test, _, case = name.partition("[")
    return any(test == one and some in case for one, _, some in (key.partition("/") for key in EXPLAINED[tuner]))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """PEFT's tests as a package, and stand-ins for the models of the hub that they name."""
    folder = tmp_path_factory.mktemp("peft")
    given = os.environ.get("PEFT_SOURCE")
    if given is None:
        wanted = f"peft=={peft.__version__}"
        fetch = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            ":all:",
            "-d",
            folder,
            wanted,
        ]
        subprocess.run(fetch, check=True)
        with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        given = next(path for path in folder.glob("peft-*") if path.is_dir())
    shutil.copytree(Path(given) / "tests", folder / "own" / "tests")
    (folder / "own" / "tests" / "__init__.py").touch()  # they import each other relatively
    write_stand_ins(folder / "cache")
    return folder


@pytest.mark.parametrize("models", ["custom", "decoder"])
@pytest.mark.parametrize("tuner", CONFIGS)
def test_what_fails_is_refused_by_name_or_explained(source, tmp_path, tuner, models):
    outcomes = tmp_path / "outcomes.json"
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts=", "--rootdir", source / "own"]
    ours = ["-p", "substitution", "--tuner", tuner, "--outcomes", outcomes]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(source / "cache"),
    }
    command = [sys.executable, "-m", "pytest", *options, *ours, f"tests/test_{models}_models.py"]
    run = subprocess.run(command, cwd=source / "own", env=environment, capture_output=True, text=True, check=False)
    assert outcomes.is_file(), run.stdout + run.stderr

    said = json.loads(outcomes.read_text())
    failed = {name: one for name, one in said.items() if one["outcome"] == "failed"}
    refused = {name: one for name, one in failed.items() if one["kind"] == "refused"}
    explained = {name for name in failed.keys() - refused.keys() if _is_explained(name, tuner)}
    counts = Counter(one["outcome"] for one in said.values())
    print(f"\n{tuner}, {models}: {dict(counts)}, of the failures {len(refused)} refused, {len(explained)} explained")
    for words, count in Counter(" ".join(one["error"].split()[:9]) for one in refused.values()).most_common():
        print(f"  {count} {words}")
    left = {name: one for name, one in failed.items() if name not in refused and name not in explained}
    assert not left, json.dumps(left, indent=1)
