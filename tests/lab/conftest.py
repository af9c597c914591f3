import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.lab.tiny_runs import pairs_task, prose_task, question_task, tiny_bert, tiny_llama, tiny_settings

from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.run import RunResult, train
from lamella.lab.runs.trained import load_trained


@contextmanager
def shared(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder that all workers of the session have, one at a time: what one of them has made, the others find."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of this name, filled by the first worker that asks for it; it is only read."""
    with shared(tmp_path_factory, name) as folder:
        made = folder / name
        if not made.exists():
            make(made)
    return made


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(once(tmp_path_factory, "bert", tiny_bert))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(once(tmp_path_factory, "llama", tiny_llama))


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"file:{once(tmp_path_factory, 'questions', question_task)}"


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"file:{once(tmp_path_factory, 'prose', prose_task)}"


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"file:{once(tmp_path_factory, 'pairs', pairs_task)}"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="session")
def finished_run(
    bert: str, llama: str, questions: str, prose: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunResult]:
    """A finished run of each method, of the encoder on questions or of the decoder on prose; it is only read."""
    made: dict[str, RunResult] = {}

    def make(method: object, decoder: bool = False) -> RunResult:
        key = json.dumps([method, decoder])
        if key not in made:
            settings = tiny_settings(llama if decoder else bert, prose if decoder else questions, method)
            name = f"run-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
            fresh: list[RunResult] = []
            run = RunFolder(once(tmp_path_factory, name, lambda folder: fresh.append(train(settings, folder))))
            made[key] = fresh[0] if fresh else RunResult(run, run.metrics(), load_trained(run.path).model)
        return made[key]

    return make
