import pytest
from tests.lab.tiny_loras import base_with_head, save_lora


@pytest.fixture(scope="session")
def base(bert, questions, tmp_path_factory):
    return base_with_head(bert, questions, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def loras(base, questions, tmp_path_factory):
    """Three LoRAs of one shape; one has a name that no PyTorch module could have."""
    folder = tmp_path_factory.mktemp("loras")
    return {name: save_lora(base, questions, folder / name, seed) for seed, name in enumerate(("a", "b.v1", "c c"))}
