"""The file of a composition's routers."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamella.errors import LamellaError
from lamella.files import whole

ROUTERS = "routers.safetensors"
_CONFIG = "adapter_config.json"


def write_routers(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the routers' tensors into a folder, whole or not at all."""
    with whole(folder / ROUTERS) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)


def read_routers(folder: Path) -> dict[str, Tensor]:
    """Reads them again.

    Raises:
        LamellaError: the folder is no saved composition, or its file is damaged.
    """
    for name in (_CONFIG, ROUTERS):
        if not (folder / name).is_file():
            raise LamellaError(f"{folder} has no {name}, so it is no saved composition of a pipeline.")
    try:
        with safe_open(folder / ROUTERS, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LamellaError(f"{folder / ROUTERS} is no safetensors file or is cut short ({error}).") from error
