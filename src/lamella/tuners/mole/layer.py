"""One linear module with the LoRAs that are composed on it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lamella.backbones import Place
from lamella.errors import CannotMergeError, LamellaError
from lamella.kernels import FrozenLoras, forward_frozen, leave_out_unused
from lamella.routing import current_frame
from lamella.tuners.mole.group import Group, Member
from lamella.tuners.mole.router import MoleRouter
from lamella.tuners.routed import AttachedLoss, RoutedLayer

CANNOT_MERGE = (
    "MOLE decides the weights of its LoRAs for each input, so there is no single weight to merge into the base. Use "
    "lamella.collapse(model, batches) for one plain LoRA with measured error. A trainer that syncs weights by merging "
    "(TRL with vLLM) needs the collapsed LoRA."
)


class FrozenFactors(nn.Module):
    """The factors of K LoRAs on one module, as buffers: never trained, and saved only where they are to be."""

    A: Tensor
    B: Tensor

    def __init__(self, loras: FrozenLoras, saved: bool) -> None:
        super().__init__()
        self.ranks = loras.ranks
        self.known = False
        self.register_buffer("A", loras.A, persistent=saved)
        self.register_buffer("B", loras.B, persistent=saved)


class MoleLinear(Member, BaseTunerLayer):
    """``y = W0 x + sum_i G_i s_i B_i A_i x``, with the weights G of the group that the module belongs to.

    Tensors per adapter: ``lamella_mole_loras.A (R, in)`` and ``.B (out, R)``, frozen; and, at the module that holds its
    group's router, ``lamella_mole_router.e (K, K, D)``, ``.bias (K,)`` and ``.log_temperature ()``.
    PEFT sees from "Linear" in the class's name that a further adapter's "all-linear" means this layer too.
    """

    adapter_layer_names: tuple[str, ...] = ("lamella_mole_router", "lamella_mole_loras")
    other_param_names: tuple[str, ...] = ("groups",)

    # What BaseTunerLayer, which is untyped, brings along.
    active_adapters: list[str]
    disable_adapters: bool
    _disable_adapters: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, name: str, place: Place | None) -> None:
        """Wraps a linear layer.

        Args:
            base_layer: the layer.
            name: its dotted name in the model.
            place: where it lies; None outside the blocks.
        """
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.place = place
        self.lamella_mole_router = nn.ModuleDict()
        self.lamella_mole_loras = nn.ModuleDict()
        self.groups: dict[str, Group] = {}
        self.merged_adapters: list[str] = []
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        assert in_features is not None  # LoRAs are only mapped to linear modules
        assert out_features is not None
        self.in_features, self.out_features = in_features, out_features

    @property
    def reads_encoder(self) -> bool:
        """Whether its input is the encoder's states."""
        return self.place is not None and self.place.reads_encoder

    def update_layer(self, adapter: str, loras: FrozenLoras, saved: bool, router: MoleRouter | None) -> None:
        """Gives this module the LoRAs of an adapter, and the router that it is to hold."""
        self.lamella_mole_loras[adapter] = FrozenFactors(loras, saved)
        if router is not None:
            self.lamella_mole_router[adapter] = router
        self._move_adapter_to_device_of_base_layer(adapter)

    def loras(self, adapter: str) -> FrozenLoras:
        """The LoRAs of an adapter, scaling inside B."""
        factors = self.lamella_mole_loras[adapter]
        assert isinstance(factors, FrozenFactors)
        if not factors.known:
            self._refuse_unread(adapter, factors)
        return FrozenLoras(factors.A, factors.B, factors.ranks)

    def _refuse_unread(self, adapter: str, factors: FrozenFactors) -> None:
        if bool(factors.A.isnan().any() | factors.B.isnan().any()):
            raise LamellaError(
                f"The LoRAs of adapter {adapter!r} at {self.name} are not numbers: they are to come from the adapter's "
                "own file (embed_adapters), which was not read or is broken. Load the folder that it was saved to with "
                "PeftModel.from_pretrained or load_adapter."
            )
        factors.known = True

    def runs(self, group: Group) -> bool:
        """Whether the group's adapter is on here."""
        return not self.disable_adapters and group.adapter in self.active_adapters and group.adapter in self.groups

    def routed_layer(self, adapter: str) -> RoutedLayer | None:
        """The router that this module owns, for `lamella.tuners.routed.RoutedModule`."""
        if adapter not in self.lamella_mole_router:
            return None
        group = self.groups[adapter]
        balance, names, loss = group.balance, group.names, None
        if balance.counts:
            name = f"log balance of {adapter}" if balance.kind == "log" else group.name  # log: one loss of all routers
            settings = f"router_aux_loss_coef={balance.coefficient:g}"
            loss = AttachedLoss(name, settings, may_be_zero=balance.kind == "entropy")
        place, count = group.place, len(names)
        return RoutedLayer(self, group.name, place, adapter, group.router, count, count, expert_names=names, loss=loss)

    @property
    def goes_with_sequences(self) -> bool:
        """Whether an active group's decision has to go with each sequence, for `lamella.tuners.cache`."""
        if self.disable_adapters:
            return False
        return any(self.groups[name].goes_with_sequences for name in self.active_adapters if name in self.groups)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Maps ``x (..., in)`` to ``(..., out)``."""
        frame, y = current_frame(), None
        for adapter in [] if self.disable_adapters else self.active_adapters:
            if adapter not in self.groups:
                continue
            group = self.groups[adapter]
            weights, h = group.mixing_weights(self, x, frame)
            if weights is None:
                continue
            loras = self.loras(adapter)
            if h is None and group.leaves_out(weights):
                weights, loras = leave_out_unused(weights, loras)
            base = self.base_layer if y is None and not args and not kwargs else self._rest(y, args, kwargs)
            plain = self._plain() if base is self.base_layer else None
            y = forward_frozen(base, plain, x, weights, loras, h)
        return self.base_layer(x, *args, **kwargs) if y is None else y

    def _rest(self, y: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """What a further adapter adds to: what the layer has put out so far."""
        return lambda x: self.base_layer(x, *args, **kwargs) if y is None else y

    def _plain(self) -> tuple[Tensor, Tensor | None] | None:
        """The layer's matrix ``(out, in)`` and bias, where it is nothing else and nobody hooks into it."""
        layer = self.base_layer
        hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
        if type(layer) not in (nn.Linear, Conv1D) or hooked:
            return None
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        assert isinstance(weight, Tensor)
        bias = layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return (weight, bias) if weight.is_floating_point() and not weight.requires_grad else None

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        raise CannotMergeError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise CannotMergeError(f"{self.name} is never merged, so there is nothing to unmerge.")

    def __repr__(self) -> str:
        return "mole." + super().__repr__()


def empty(ranks: Sequence[int], layer: MoleLinear) -> FrozenLoras:
    """Room for LoRAs that the adapter's file is to fill.

    It is filled with NaN, so that LoRAs that were never read cannot pass for LoRAs that do nothing.
    """
    total = sum(ranks)
    A = torch.full((total, layer.in_features), torch.nan)
    return FrozenLoras(A, torch.full((layer.out_features, total), torch.nan), tuple(ranks))
