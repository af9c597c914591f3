"""Reading a trained LoRA, whoever wrote it."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lamella.adapters.locate import locate
from lamella.adapters.peft_folder import read_peft
from lamella.adapters.single_file import read_single
from lamella.adapters.source import LoraSource, Reference, described
from lamella.errors import LamellaError


def read_lora(
    reference: str | Path | Reference,
    revision: str | None = None,
    subfolder: str | None = None,
    name: str | None = None,
) -> LoraSource:
    """Reads a trained LoRA and says what it is.

    Args:
        reference: a PEFT folder, a .safetensors file in kohya's or diffusers' format, a hub id or ``HUB_ID/FILE``; or
            a Reference, whose digest is checked where it has one.
        revision: of a hub id.
        subfolder: inside the folder or repository.
        name: what to call it; by its folder or file where None.

    Raises:
        LamellaError: it is not there, is a pickle, has changed since, is not a plain LoRA, is empty or damaged, or
            holds tensors nobody knows; or diffusers is needed and absent.
    """
    if not isinstance(reference, Reference):
        reference = Reference(str(reference), revision, subfolder)
    elif revision is not None or subfolder is not None:
        raise LamellaError("A Reference names its own revision and subfolder; give them there.")
    files = locate(reference)
    name = name or files.stem
    who = described(name, files.reference)
    tensors, metadata = _load(files.weights, who)
    parsed = (
        read_peft(files.config.parent, tensors, who)
        if files.config is not None
        else read_single(tensors, metadata, who)
    )
    if not parsed.components:
        left = "; ".join(f"{key}: {reason}" for key, reason in parsed.skipped[:3])
        raise LamellaError(f"{who} holds no LoRA of a linear layer{f' ({left})' if left else ': it is empty'}.")
    return LoraSource(name, files.reference, parsed.format, parsed.base, parsed.components, tuple(parsed.skipped))


def _load(weights: Path, who: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors and header."""
    try:
        with safe_open(weights, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LamellaError(
            f"{who} cannot be read: {weights.name} is not a safetensors file or is cut short ({error})."
        ) from error
