"""A composition's LoRAs as they lie side by side, for collapsing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from torch import Tensor, nn

from lamella.backbones.offloading import onloaded
from lamella.compiling import eagerly
from lamella.errors import LamellaError
from lamella.kernels.frozen import group_rows, scale_columns
from lamella.routing import Frame
from lamella.tuners.mole.group import Group
from lamella.tuners.mole.layer import MoleLinear
from lamella.tuners.routed import See


class MoleMixture:
    """The LoRAs of one adapter, mixed with the weights of its groups.

    Raises:
        LamellaError: outputs of blocks are mixed, or biases.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self.adapter = adapter
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, MoleLinear) and adapter in module.groups
        }
        self.names = {id(layer): name for name, layer in self.layers.items()}
        self.groups: set[Group] = {layer.groups[adapter] for layer in self.layers.values()}
        form = next(iter(self.groups)).config.form
        if form != "delta":
            raise LamellaError(
                f"form={form!r} mixes the outputs of whole blocks, each run with one LoRA, and no plain LoRA does the "
                "same. Collapse a composition with form='delta'."
            )
        biased = [name for name, layer in self.layers.items() if layer.frozen(adapter).constant is not None]
        if biased:
            raise LamellaError(
                f"The LoRAs have biases of {len(biased)} modules, first {biased[0]}, which a plain LoRA cannot bring. "
                "Leave them out of the composition with exclude_modules, or train LoRAs with bias='none'."
            )

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``(R, in)`` and ``(out, R)``; of a convolution the input is a patch, of an embedding a token."""
        layer = self.layers[name]
        with onloaded(layer.lamella_mole_loras[self.adapter]):
            stored = layer.frozen(self.adapter)
            return stored.A.double().cpu(), stored.B.double().cpu()

    def experts(self) -> NoReturn:
        """Raises: they are files already."""
        raise LamellaError(
            "The experts of a MOLE adapter are LoRAs that were trained before: they lie where its config's adapters "
            "say. For one LoRA that does what they do together, use lamella.collapse."
        )

    @contextmanager
    def watched(self, see: See) -> Iterator[None]:
        """Inputs and weights as the groups give them out."""

        def watch(layer: MoleLinear, x: Tensor, weights: Tensor, frame: Frame | None) -> None:
            loras = layer.loras(self.adapter)
            h = x.to(loras.A.dtype) @ loras.A.t()  # (*rows, R)
            u = scale_columns(*group_rows(h, weights.to(h)), loras.ranks).flatten(0, 1)  # (N, R)
            h = h.flatten(0, -2)
            mask = None if frame is None else frame.token_mask(x, of_encoder=layer.reads_encoder)
            see(self.names[id(layer)], *((h, u) if mask is None else (h[mask], u[mask])))

        for group in self.groups:
            group.watchers.append(watch)
        try:
            with eagerly():
                yield
        finally:
            for group in self.groups:
                group.watchers.remove(watch)
