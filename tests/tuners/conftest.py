from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where trained LoRAs lie, each made by the first test that asks for it; to be read alone."""
    return tmp_path_factory.mktemp("loras")
