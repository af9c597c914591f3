"""Reading a trained LoRA, whoever wrote it."""

import warnings
from pathlib import Path
from typing import Any

import torch
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
    pipe: Any = None,
) -> LoraSource:
    """Reads a trained LoRA and says what it is.

    Args:
        reference: a PEFT folder, a .safetensors file in kohya's or diffusers' format, a hub id or ``HUB_ID/FILE``; or
            a Reference, whose digest is checked where it has one.
        revision: of a hub id.
        subfolder: inside the folder or repository.
        name: what to call it; by its folder or file where None.
        pipe: the diffusers pipeline that the LoRA is for, whose class knows the names that other programs use for its
            modules; None reads the names of Stable Diffusion, and those that need no translation.

    Raises:
        LamellaError: it is not there, is a pickle, has changed since, is not a plain LoRA, is empty or damaged, or
            holds tensors nobody knows; or diffusers is needed and absent.
    """
    if not isinstance(reference, Reference):
        if not isinstance(reference, str | Path):
            raise LamellaError(
                f"A LoRA is named by its path or hub id, and here a {type(reference).__name__} is given. {_SAVE_IT}"
            )
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
        else read_single(tensors, metadata, who, pipe)
    )
    if not parsed.components:
        left = "; ".join(f"{key}: {reason}" for key, reason in parsed.skipped[:3])
        raise LamellaError(f"{who} holds no LoRA{f' ({left})' if left else ': it is empty'}.")
    source = LoraSource(
        name, files.reference, parsed.format, parsed.base, parsed.components, tuple(parsed.skipped),
        parsed.constants, parsed.whole, parsed.tokens, parsed.config,
    )  # fmt: skip
    if source.is_zero:
        warnings.warn(
            f"{who} adds nothing: A, B or alpha is zero in all its modules, as B is before the first step of training.",
            stacklevel=2,
        )
    return source


def _load(weights: Path, who: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors and header."""
    try:
        with safe_open(weights, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {name: _computable(name, tensor, who) for name, tensor in tensors.items()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LamellaError(
            f"{who} cannot be read: {weights.name} is not a safetensors file or is cut short ({error})."
        ) from error


def _computable(name: str, tensor: Tensor, who: str) -> Tensor:
    """A tensor in a precision that torch computes in: bfloat16 holds every float8 exactly."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind.startswith("float8"):
        return tensor.to(torch.bfloat16)
    if "lora" in name and not name.endswith("alpha") and (not tensor.is_floating_point() or kind.startswith("float4")):
        raise LamellaError(
            f"{who} holds {name} as {kind}, the codes of a quantised LoRA, whose scales only the program that wrote it "
            "knows. Save it there in float16 or bfloat16."
        )
    return tensor


_SAVE_IT = "Save what is in memory first (save_pretrained, save_lora_weights or safetensors.torch.save_file)."
