"""Every process of the tests has one thread and asks no hub.

Two busy threads make each other many times slower on small machines, and a hub that does not answer is waited for.
"""

import gc
import os

for name, value in (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(name, value)  # before torch and huggingface_hub read them

import pytest  # noqa: E402
import torch  # noqa: E402
from tests.processes import fresh_processes  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays, and is not looked through again at each of the Trainer's collections of garbage."""
    gc.disable()
    collected = yield
    gc.freeze()
    gc.enable()
    return collected


@pytest.fixture(scope="session")
def fresh():
    """Processes that have imported everything and done nothing."""
    return fresh_processes("lamella.cli", "lamella.lab.studies.runner")
