"""LoRA files of tiny pipelines, written once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import tiny_pipelines as tiny

Loras = Callable[[Callable[[], Any]], dict[str, Path]]


@pytest.fixture(scope="session")
def loras_of(tmp_path_factory: pytest.TempPathFactory) -> Loras:
    """The LoRAs cat and dog of a kind of pipeline by the function that makes it."""
    written: dict[str, dict[str, Path]] = {}

    def files(make: Callable[[], Any]) -> dict[str, Path]:
        if make.__name__ not in written:
            pipe, folder = make(), tmp_path_factory.mktemp(make.__name__)
            written[make.__name__] = {
                name: tiny.write_lora(pipe, folder / name, at) for at, name in enumerate(("cat", "dog"))
            }
        return written[make.__name__]

    return files
