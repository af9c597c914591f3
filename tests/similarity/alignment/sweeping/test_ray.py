"""The sweep on a local Ray cluster of two nodes; by default tests/test_cluster.py has one with a single worker."""

import functools
import os
import signal
import sys

import pandas as pd
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from lamella.errors import LamellaError
from lamella.progress import listening
from lamella.similarity.alignment import align, sweep, write_alignment

QUICK = {"aligner": "linear", "steps": 3, "tile_pairs": 22}


@pytest.fixture(scope="module")
def address():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster.address
        ray.shutdown()
        cluster.shutdown()
    left = [one for one in psutil.Process().children(recursive=True) if one.pid not in before]
    psutil.wait_procs(left, timeout=20)
    assert not [one for one in left if one.is_running()]


@pytest.fixture
def connected(address):
    """A connection that stays from test to test, and its workers with it: a worker takes long to start."""
    if not ray.is_initialized():
        ray.init(address=address, logging_level="ERROR")
    yield address
    assert ray.is_initialized()  # a sweep does not close what it did not open


def dying(marker, first):
    """`align`, but the worker that gets the tile with source ``first`` is killed, each time until the marker exists."""

    @functools.wraps(align)
    def align_or_die(capture, model, pairs=None, **settings):
        if pairs[0][0] == first:
            with marker.open("a") as tries:
                tries.write("x")
            if marker.read_text() == "x":
                os.kill(os.getpid(), signal.SIGKILL)
        return align(capture, model, pairs, **settings)

    return align_or_die


@pytest.mark.heavy  # half a minute; by default a study's workers are killed, on the same piece of code
def test_a_killed_worker_changes_nothing(study, tmp_path, connected):
    seen = []
    here = sweep(study.capture, study.model, tmp_path / "here", load=study.load, **QUICK)
    with listening(lambda work: seen.append((work.done, work.total))):
        there = sweep(
            study.capture, study.model, tmp_path / "there", load=study.load, ray=connected,
            align=dying(tmp_path / "tries", (1, 0)), **QUICK,
        )  # fmt: skip
    assert (tmp_path / "tries").read_text() == "xx"
    pd.testing.assert_frame_equal(here, there, check_exact=True)
    names = [sorted(path.name for path in (tmp_path / place / "tiles").iterdir()) for place in ("here", "there")]
    assert names[0] == names[1]
    assert len(names[0]) == 6
    for place, table in (("here", here), ("there", there)):
        write_alignment(table, tmp_path / place / "alignment.parquet")
    for name in ["alignment.parquet", *(f"tiles/{tile}" for tile in names[0])]:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    assert seen == [(done, 6) for done in range(1, 7)]


def test_without_ray_it_says_what_to_install(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LamellaError, match=r"pip install lamella\[ray\]"):
        sweep(study.capture, study.model, tmp_path, load=study.load, ray="auto", **QUICK)


@pytest.mark.heavy  # a worker starts five times
def test_a_tile_that_kills_every_worker_is_named(study, tmp_path, connected):
    @functools.wraps(align)
    def deadly(capture, model, pairs=None, **settings):
        if pairs[0][0] == (2, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return align(capture, model, pairs, **settings)

    with pytest.raises(LamellaError, match=r"4 workers died over one tile .experts 2 to 3 of layer 2 as sources, 22"):
        sweep(study.capture, study.model, tmp_path, load=study.load, ray=connected, align=deadly, **QUICK)


@pytest.mark.heavy  # workers start anew for each connection
def test_it_opens_and_closes_its_own_connection_even_when_interrupted(study, tmp_path, address):
    ray.shutdown()

    def killed(work):
        if work.done == 2:
            raise KeyboardInterrupt

    settings = {"load": study.load, "ray": address, **QUICK}
    with pytest.raises(KeyboardInterrupt), listening(killed):
        sweep(study.capture, study.model, tmp_path, **settings)
    assert not ray.is_initialized()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiles").glob("[!.]*")}
    assert len(before) >= 2
    table = sweep(study.capture, study.model, tmp_path, **settings)
    assert not ray.is_initialized()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(table) == 12 * 11 + 2 * 12


def test_without_a_cluster_it_says_how_to_start_one(study, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", _no_cluster)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(LamellaError, match=r"No Ray cluster answers at 'auto': .* `ray start --head`"):
        sweep(study.capture, study.model, tmp_path, load=study.load, ray="auto", **QUICK)


def _no_cluster(address, **settings):
    raise ConnectionError("Could not find any running Ray instance.")
