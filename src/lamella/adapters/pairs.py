"""From a file's tensors under PEFT's names to A and B of each module."""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lamella.adapters.source import Factors
from lamella.errors import LamellaError

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.weight)?")
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


def pair(
    tensors: Mapping[str, Tensor],
    scaling_of: Callable[[str, int], float],
    reason_to_skip: Callable[[str], str | None],
    who: str,
) -> tuple[dict[str, Factors], list[tuple[str, str]]]:
    """A and B of each module, checked.

    Args:
        tensors: by PEFT's names, ``MODULE.lora_A.weight`` and ``MODULE.lora_B.weight``, without prefix.
        scaling_of: the scaling of a module of a rank.
        reason_to_skip: why a tensor that is neither A nor B is left out; None where nobody knows it.
        who: the LoRA, for errors.

    Returns:
        The factors by module name, and what was skipped with the reason.

    Raises:
        LamellaError: a tensor nobody knows, an A without B, ranks that differ, or a number that is not finite.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    skipped: list[tuple[str, str]] = []
    unknown: list[str] = []
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is not None:
            factors = sides.setdefault(match["module"], {})
            if match["side"] in factors:
                raise LamellaError(
                    f"{who} has {match['module']}.lora_{match['side']} twice. Save it again without one."
                )
            factors[match["side"]] = tensor
        elif (reason := reason_to_skip(key)) is not None:
            skipped.append((key, reason))
        else:
            unknown.append(key)
    if unknown:
        raise LamellaError(
            f"{who} holds {len(unknown)} tensors that do not belong to any known kind of LoRA, first {unknown[0]}. "
            "Load it where it was made and save it with PEFT or diffusers."
        )
    modules: dict[str, Factors] = {}
    for module, factors in sides.items():
        kernel = _kernel(module, factors, who)
        if kernel not in ((), (1, 1)):
            skipped.append(
                (module, f"a {'x'.join(map(str, kernel))} convolution; only linear layers and 1x1 are composed")
            )
            continue
        A, B = (factors[side].flatten(1) for side in "AB")
        for side, factor in (("A", A), ("B", B)):
            if not torch.isfinite(factor).all():
                raise LamellaError(f"{who} has numbers that are not finite in {module}.lora_{side}. Train it again.")
        modules[module] = Factors(A, B, scaling_of(module, len(A)))
    return modules, skipped


def _kernel(module: str, factors: Mapping[str, Tensor], who: str) -> tuple[int, ...]:
    """The kernel of a convolution's A, () for a linear layer; checks that A and B belong together."""
    for side, other in (("A", "B"), ("B", "A")):
        if side not in factors:
            raise LamellaError(
                f"{who} has {module}.lora_{other} without lora_{side}. The file is incomplete; save it again."
            )
    A, B = factors["A"], factors["B"]
    linear = A.dim() == 2 and B.dim() == 2
    convolution = A.dim() == 4 and B.dim() == 4 and tuple(B.shape[2:]) == (1, 1)
    if not (linear or convolution) or not A.shape[0] or A.shape[0] != B.shape[1]:
        raise LamellaError(
            f"{who} has {module} with A {tuple(A.shape)} and B {tuple(B.shape)}, which are not A (r, in) and B "
            "(out, r). The file is incomplete or damaged; save it again."
        )
    return tuple(A.shape[2:])
