"""LoRAs weighed for each place of an image by itself, written to be read. Imports no lamella.

A linear map is given a row of features for each place, or for each word of the prompt. A convolution is given a patch
for each place of its output: what its kernel lies on, as one row. Either way a LoRA puts out ``s B A row``, and so
weights for a place stand between ``A row`` and the output there, also where the kernel is larger than 1 x 1: ``B`` has
no kernel of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from tests.reference.mole import Lora, output
from tests.reference.mole_model import Unit, weights_of_row
from torch import Tensor, nn


def rows_of(module: nn.Module, x: Tensor) -> Tensor:
    """What a module's matrix is multiplied by, ``(batch, places, in)``."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(len(x), -1, x.shape[-1])
    patches = []
    (down, across), (height, width) = module.stride, module.kernel_size
    framed = nn.functional.pad(x, (module.padding[1],) * 2 + (module.padding[0],) * 2)
    for top in range(0, framed.shape[2] - height + 1, down):
        for left in range(0, framed.shape[3] - width + 1, across):
            patches.append(framed[:, :, top : top + height, left : left + width].flatten(1))
    return torch.stack(patches, dim=1)


def outputs_of(module: nn.Module, y: Tensor) -> Tensor:
    """A module's output at each place, ``(batch, places, out)``, a view where it can be written to."""
    return y.flatten(2).transpose(1, 2) if isinstance(module, nn.Conv2d) else y.view(len(y), -1, y.shape[-1])


@contextmanager
def composed(
    model: nn.Module, loras: Mapping[str, Sequence[Lora]], units: Sequence[Unit], dropped: Sequence[int] = ()
) -> Iterator[dict[str, Tensor]]:
    """Composes LoRAs on a model of images for one forward inside the context, each place deciding for itself.

    Args:
        model: a plain model, in float64.
        loras: the K LoRAs of each adapted module; of a convolution, A as a matrix ``(r, in)``.
        units: what decides; the modules of one are given the same places, or the same words.
        dropped: LoRAs that are left out.

    Yields:
        Each unit's weights by its first member, ``(batch, places, K)``, once it has decided.
    """
    unit_of = {name: unit for unit in units for name in unit.members}
    decided: dict[str, Tensor] = {}

    def decide(unit: Unit, rows: Tensor) -> Tensor:
        readers = [loras[name] for name in unit.readers]
        widths = [next(len(lora[1]) for lora in own if lora is not None) for own in readers]
        images = [[weights_of_row(row[None], readers, widths, unit, dropped) for row in image] for image in rows]
        return torch.stack([torch.stack(image) for image in images])

    def add(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            rows, unit = rows_of(module, args[0]), unit_of[name]
            if unit.members[0] not in decided:  # the first that runs is one that the router reads
                decided[unit.members[0]] = decide(unit, rows)
            weights, result = decided[unit.members[0]], y.clone()
            there = outputs_of(module, result)
            for b in range(rows.shape[0]):
                for place in range(rows.shape[1]):
                    for lora, weight in zip(loras[name], weights[b, place], strict=True):
                        there[b, place] += weight * output(lora, rows[b, place], there.shape[-1])
            return result

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(add(name)) for name in unit_of]
    try:
        yield decided
    finally:
        for hook in hooks:
            hook.remove()
