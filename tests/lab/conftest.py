import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.lab.tiny_runs import prose_task, question_task, tiny_bert, tiny_llama, tiny_settings

from lamella.lab.runs.run import RunResult, train


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    return question_task(tmp_path_factory.mktemp("tasks") / "questions")


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prose_task(tmp_path_factory.mktemp("tasks") / "prose")


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
            made[key] = train(settings, tmp_path_factory.mktemp("finished") / "run")
        return made[key]

    return make
