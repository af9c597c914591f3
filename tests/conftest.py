"""Every process of the tests has one thread and asks no hub.

Two busy threads make each other many times slower on small machines, and a hub that does not answer is waited for.
"""

import functools
import gc
import multiprocessing
import os
import signal
import sys
import uuid

import jinja2
import pytest
from tests.processes import serve_forks

# before torch and huggingface_hub read them
os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # processes of tests write past pytest
# a shell has Ctrl-C ignored by what it starts in the background, and by all that this starts
signal.signal(signal.SIGINT, signal.default_int_handler)


# PEFT compiles the template of its model card anew at each save.
jinja2.Template = functools.cache(jinja2.Template)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays, and is not looked through again at each of the Trainer's collections of garbage."""
    gc.disable()
    collected = yield
    gc.freeze()
    gc.enable()
    if "datasets" in sys.modules:  # it digests each table, to name what it would keep of it
        sys.modules["datasets"].arrow_dataset.generate_fingerprint = lambda _: uuid.uuid4().hex
    if sys.platform == "linux":
        serve_forks()
    return collected


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """What a file of tests has imported and kept stays too."""
    done = yield
    if nextitem is not None and nextitem.path != item.path and len(gc.get_objects()) > 20_000:
        gc.collect()
        gc.freeze()
    return done


@pytest.fixture(scope="session")
def fresh():
    """Processes that have imported everything and done nothing."""
    return multiprocessing.get_context("forkserver")
