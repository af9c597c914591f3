from pathlib import Path

import pytest
from tests.lab.tiny_runs import prose_task, question_task, tiny_bert, tiny_llama


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
