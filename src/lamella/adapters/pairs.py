"""From a file's tensors under PEFT's names to A and B of each module."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.adapters.source import EmbeddingFactors, Factors
from lamella.errors import LamellaError

_PART = re.compile(
    r"(?P<module>.+)\.(lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?|lora_B\.(?P<bias>bias)|(?P<alpha>alpha))"
)
_NOT_LORA = {
    "hada_w": "a LoHa",
    "lokr_w": "a LoKr",
    "oft_": "an OFT adapter",
    "ia3_l": "an IA3 adapter",
    "vera_lambda": "a VeRA adapter",
    "lora_mid": "a LoCon in Tucker form",
}
_DORA = ("lora_magnitude_vector", "dora_scale")


def refuse_other_methods(names: Iterable[str], who: str) -> None:
    """Refuses what is not a plain LoRA, by the names of its tensors.

    Raises:
        LamellaError: a DoRA, or an adapter of another method.
    """
    for name in names:
        if any(mark in name for mark in _DORA):
            raise LamellaError(
                f"{who} is a DoRA ({name}): it rescales the columns of the base weight, which no sum of low-rank "
                "deltas can express. Train it with use_dora=False, or merge it into the base and extract a LoRA."
            )
        for mark, method in _NOT_LORA.items():
            if mark in name:
                raise LamellaError(f"{who} is {method} ({name}), not a LoRA. Only LoRAs can be composed.")


def is_part(name: str) -> str | None:
    """The module whose A, B, bias of B or alpha a tensor is, by PEFT's names; None for any other tensor."""
    match = _PART.fullmatch(name)
    return None if match is None else match["module"]


@dataclass(frozen=True)
class Pairs:
    """Tensors under PEFT's names, put together.

    Attributes:
        modules: factors by module.
        constants: the biases of B with the scaling inside, ``(out,)``, by module.
        rest: the tensors that are no part of a LoRA's factors.
    """

    modules: dict[str, Factors]
    constants: dict[str, Tensor]
    rest: dict[str, Tensor]


def pair(tensors: Mapping[str, Tensor], scaling_of: Callable[[str, int], float], who: str) -> Pairs:
    """A and B of each module, checked.

    Args:
        tensors: by PEFT's names, ``MODULE.lora_A.weight`` and ``MODULE.lora_B.weight``, without prefix. An alpha beside
            them, ``MODULE.alpha``, is that module's.
        scaling_of: the scaling of a module of a rank that has no alpha beside it.
        who: the LoRA, for errors.

    Raises:
        LamellaError: an A without B, an alpha without either, ranks that differ, or a number that is not finite.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    embeddings: set[str] = set()
    for key, tensor in tensors.items():
        match = _PART.fullmatch(key)
        if match is None:
            rest[key] = tensor
            continue
        part, of_module = match["side"] or match["bias"] or match["alpha"], parts.setdefault(match["module"], {})
        if part in of_module:
            raise LamellaError(f"{who} has {match['module']}.lora_{part} twice. Save it again without one.")
        of_module[part] = tensor
        if match["embedding"]:
            embeddings.add(match["module"])
    modules: dict[str, Factors] = {}
    constants: dict[str, Tensor] = {}
    for module, of_module in parts.items():
        _check(module, of_module, who)
        A, B, alpha = of_module["A"], of_module["B"].flatten(1), of_module.get("alpha")
        if len(A) != B.shape[1]:  # a convolution in groups: each part of the output has its own part of the rank
            B = torch.block_diag(*B.chunk(len(A) // B.shape[1]))
        scaling = scaling_of(module, len(A)) if alpha is None else float(alpha) / len(A)
        kind = EmbeddingFactors if module in embeddings else Factors
        modules[module] = kind(A.flatten(1) if set(A.shape[2:]) <= {1} else A, B, scaling)
        if "bias" in of_module:
            constants[module] = scaling * of_module["bias"].float()
    return Pairs(modules, constants, rest)


def _check(module: str, parts: Mapping[str, Tensor], who: str) -> None:
    """Raises unless a module's tensors belong together."""
    for side, other in (("A", "B"), ("B", "A")):
        if side not in parts:
            there = f"lora_{other}" if other in parts else " and ".join(parts)
            raise LamellaError(
                f"{who} has {module}.{there} without lora_{side}. The file is incomplete; save it again."
            )
    A, B, bias = parts["A"], parts["B"], parts.get("bias")
    is_linear = A.dim() == 2 and B.dim() == 2
    is_convolution = A.dim() > 2 and A.dim() == B.dim() and set(B.shape[2:]) == {1}
    fits = (is_linear or is_convolution) and A.shape[0] and B.shape[1] and A.shape[0] % B.shape[1] == 0
    groups = A.shape[0] // B.shape[1] if fits else 0
    fits = fits and (groups == 1 or (is_convolution and B.shape[0] % groups == 0))
    if not fits or (bias is not None and bias.shape != B.shape[:1]):
        also = "" if bias is None else f" and a bias {tuple(bias.shape)}"
        raise LamellaError(
            f"{who} has {module} with A {tuple(A.shape)} and B {tuple(B.shape)}{also}, which are not A (r, in) and B "
            "(out, r). The file is incomplete or damaged; save it again."
        )
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise LamellaError(f"{who} has {parts['alpha'].numel()} numbers as {module}.alpha; a module is scaled by one.")
    for name, part in parts.items():
        if not torch.isfinite(part).all():
            said = f"lora_{name}" if name in "AB" else name
            raise LamellaError(f"{who} has numbers that are not finite in {module}.{said}. Train it again.")


def refuse_unknown(names: Iterable[str], who: str) -> None:
    """Raises where a file holds tensors that nobody knows."""
    unknown = list(names)
    if unknown:
        raise LamellaError(
            f"{who} holds {len(unknown)} tensors that do not belong to any known kind of LoRA, first {unknown[0]}. "
            "Load it where it was made and save it with PEFT or diffusers."
        )
