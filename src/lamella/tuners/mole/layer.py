"""One module with the LoRAs that are composed on it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from lamella.adapters import sides_of
from lamella.backbones import Place
from lamella.backbones.offloading import onloaded
from lamella.compiling import known_when_traced
from lamella.errors import CannotMergeError, LamellaError
from lamella.kernels import FrozenLoras, forward_frozen, leave_out_unused
from lamella.routing import current_frame
from lamella.tuners.bypassing import note_call
from lamella.tuners.mole.group import Group, Member
from lamella.tuners.mole.router import GroupRouter
from lamella.tuners.mole.shelf import Shelf
from lamella.tuners.routed import AttachedLoss, RoutedLayer
from lamella.tuners.tensors import AdapterLayer, is_plain

CANNOT_MERGE = (
    "MOLE decides the weights of its LoRAs for each input, so there is no single weight to merge into the base. Use "
    "lamella.collapse(model, batches) for one plain LoRA with measured error. A trainer that syncs weights by merging "
    "(TRL with vLLM) needs the collapsed LoRA."
)


class FrozenFactors(nn.Module):
    """What K LoRAs bring to one module, as buffers: never trained, and saved only where they are to be."""

    A: Tensor
    B: Tensor
    constant: Tensor | None

    def __init__(self, loras: FrozenLoras, constant: Tensor | None, saved: bool) -> None:
        super().__init__()
        self.ranks = loras.ranks
        self.known = False
        self.register_buffer("A", loras.A, persistent=saved)
        self.register_buffer("B", loras.B, persistent=saved)
        if constant is None:
            self.constant = None  # accelerate stumbles over a buffer that is nothing
        else:
            self.register_buffer("constant", constant, persistent=saved)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenFactors":
        without = [buffer for buffer in self.buffers() if buffer.is_meta]
        super()._apply(fn, recurse)
        for buffer in self.buffers() if without else ():  # to_empty gives memory as it finds it
            if not buffer.is_meta:
                buffer.fill_(torch.nan)
                self.known = False
        return self


class MoleLinear(Member, AdapterLayer):
    """``y = W0 x + sum_i G_i (s_i B_i A_i x + c_i)``, with the weights G of the group that the module belongs to.

    Tensors per adapter: ``lamella_mole_loras.A (R, in)``, ``.B (out, R)`` and, where a LoRA adds something whatever the
    input, ``.constant (K, out)``, frozen; and, at the module that holds its
    group's router, ``lamella_mole_router.e (K, K, D)``, ``.bias (K,)`` and ``.log_temperature (1,)``.
    PEFT sees from "Linear" in the class's name that a further adapter's "all-linear" means this layer too.
    """

    adapter_layer_names: tuple[str, ...] = ("lamella_mole_router", "lamella_mole_loras")
    other_param_names: tuple[str, ...] = ("groups",)

    _get_embed_scale: Callable[[], Tensor | None]  # of BaseTunerLayer, which is untyped

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
        self.in_features, self.out_features = sides_of(self.get_base_layer())

    @property
    def reads_encoder(self) -> bool:
        """Whether its input is the encoder's states."""
        return self.place is not None and self.place.reads_encoder

    def update_layer(
        self, adapter: str, loras: FrozenLoras, constant: Tensor | None, saved: bool, router: GroupRouter | None
    ) -> None:
        """Gives this module the LoRAs of an adapter, what they add whatever the input, and the router to hold."""
        self.lamella_mole_loras[adapter] = FrozenFactors(loras, constant, saved)
        if router is not None:
            self.lamella_mole_router[adapter] = router
        self._move_adapter_to_device_of_base_layer(adapter)

    def shelve(self, adapter: str, shelf: Shelf, router: GroupRouter | None) -> None:
        """Gives this module the LoRAs of a library, and the router to hold."""
        self.lamella_mole_loras[adapter] = shelf
        if router is not None:
            self.lamella_mole_router[adapter] = router
        self._move_adapter_to_device_of_base_layer(adapter)

    def frozen(self, adapter: str) -> FrozenFactors:
        """What the LoRAs of an adapter bring, as it is stored.

        Raises:
            LamellaError: they were never read, or are those of a library, of which only a shortlist is in memory.
        """
        factors = self.lamella_mole_loras[adapter]
        if isinstance(factors, Shelf):
            raise LamellaError(
                f"{self.name} has a shortlist for each sequence, and its {len(factors.ranks)} LoRAs never lie side by "
                "side in memory. Compose those that are wanted without one: lamella.compose(base, library.only(names))."
            )
        assert isinstance(factors, FrozenFactors)
        self._refuse_unread(adapter)
        return factors

    @known_when_traced
    def _refuse_unread(self, adapter: str) -> None:
        factors: Any = self.lamella_mole_loras[adapter]
        if factors.known or torch.compiler.is_exporting():  # when no number can be looked at
            return
        if any(bool(buffer.isnan().any()) for buffer in factors.buffers()):
            raise LamellaError(
                f"The LoRAs of adapter {adapter!r} at {self.name} are not numbers: they are to come from the adapter's "
                "own file (embed_adapters), which was not read or is broken, or were put on a model without weights "
                "(device 'meta'). Load the folder that it was saved to, or compose, on a model that has its weights: "
                "PeftModel.from_pretrained, load_adapter, lamella.compose."
            )
        factors.known = True

    def loras(self, adapter: str) -> FrozenLoras:
        """The LoRAs of an adapter as maps of the `rows`, scaling inside B."""
        factors = self.frozen(adapter)
        return FrozenLoras(factors.A, factors.B, factors.ranks)

    def adding(self, adapter: str) -> Iterator[str]:
        """The LoRAs of an adapter that add anything here."""
        if isinstance(shelf := self.lamella_mole_loras[adapter], Shelf):  # the index leaves out what adds nothing
            yield from (name for name, r in zip(self.groups[adapter].names, shelf.ranks, strict=True) if r)
            return
        with onloaded(self.lamella_mole_loras[adapter]):
            stored = self.frozen(adapter)
            parts = stored.B.split(list(stored.ranks), dim=1)  # K of (out, r)
            constants = [None] * len(parts) if stored.constant is None else list(stored.constant)  # K of (out,)
            for name, B, constant in zip(self.groups[adapter].names, parts, constants, strict=True):
                if bool(B.any()) or (constant is not None and bool(constant.any())):
                    yield name

    def rows(self, adapter: str, x: Tensor) -> Tensor:
        """What the LoRAs' matrices are applied to, ``(*rows, features)``."""
        return x

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
        note_call(self, current_frame())
        frame, y = current_frame(), None
        for adapter in [] if self.disable_adapters else self.active_adapters:
            if adapter not in self.groups:
                continue
            with onloaded(self.lamella_mole_loras[adapter]):
                rows = self.rows(adapter, x)
                weights, h = self.groups[adapter].mixing_weights(self, rows, frame)
                if weights is None:
                    continue
                base, plain = self._base(x, y, args, kwargs)
                y = self._mixed(adapter, base, plain, rows, weights, h)
        return self.base_layer(x, *args, **kwargs) if y is None else self._restored(y)

    def _mixed(
        self,
        adapter: str,
        base: Callable[[Tensor], Tensor],
        plain: tuple[Tensor, Tensor | None] | None,
        rows: Tensor,
        weights: Tensor,
        h: Tensor | None,
    ) -> Tensor:
        """The layer's output with its weighted LoRAs, ``(*rows, out)``."""
        if isinstance(shelf := self.lamella_mole_loras[adapter], Shelf):
            return shelf.mix(base(rows), rows, weights)
        loras, used, constant = self.loras(adapter), weights, self.frozen(adapter).constant
        if h is None and self.groups[adapter].leaves_out(weights):
            used, loras = leave_out_unused(weights, loras)
        y = forward_frozen(base, plain, rows, used, loras, h) if sum(loras.ranks) else base(rows)
        if constant is None:
            return y
        added = weights.to(constant) @ constant  # (*some, out)
        return y + added.view(*added.shape[:-1], *[1] * (y.dim() - added.dim()), -1).to(y.dtype)

    def _base(
        self, x: Tensor, y: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor, Tensor | None] | None]:
        """What the LoRAs are added to: the layer, or what a former adapter has made of it; and the matrix it is."""
        if y is None and not args and not kwargs:
            return self.base_layer, self._plain()
        return (lambda x: self.base_layer(x, *args, **kwargs) if y is None else y), None

    def _restored(self, y: Tensor) -> Tensor:
        """An output with its features last, laid out as the layer itself does."""
        return y

    def _plain(self) -> tuple[Tensor, Tensor | None] | None:
        """The layer's matrix ``(out, in)`` and bias, where it is nothing else and nobody hooks into it."""
        layer = self.base_layer
        if torch.compiler.is_compiling() or not is_plain(layer):  # compiled, one form is for any number of tokens
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


class MoleProjection(MoleLinear):
    """A convolution or an embedding: its LoRAs are linear maps of what their A makes of the input, ``(*rows, R)``.

    Its A is stored as the matrix ``(R, in)`` whose input is a patch of the kernel's size, or a token. A module of which
    only a bias was trained has R = 0.
    """

    is_watched = False  # an embedding's weight may be the head's too, and a convolution's is read by kernels

    def loras(self, adapter: str) -> FrozenLoras:
        factors = self.frozen(adapter)
        return FrozenLoras(torch.eye(len(factors.A)).to(factors.A), factors.B, factors.ranks)

    def rows(self, adapter: str, x: Tensor) -> Tensor:
        base, A = self.get_base_layer(), self.frozen(adapter).A
        if not len(A):  # what is added does not depend on the place, of which a convolution may put out others
            rows = self._features_last(x)
            return rows[(slice(None), *[slice(1)] * (rows.dim() - 2))] if isinstance(base, _ConvNd) else rows
        if isinstance(base, nn.Embedding):
            scale = self._get_embed_scale()  # of PEFT: what some families multiply their embeddings by
            h = nn.functional.embedding(x, A.t())  # (*rows, R)
            return h if scale is None else h * scale.to(h.dtype)
        assert isinstance(base, _ConvNd)
        kernel = A.view(len(A), base.in_channels, *base.kernel_size)
        convolve = _CONVOLVE[len(base.kernel_size)]
        return self._features_last(convolve(x.to(A.dtype), kernel, None, base.stride, base.padding))

    def _base(
        self, x: Tensor, y: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[[Tensor], Tensor], None]:
        return (lambda _: self._features_last(self.base_layer(x, *args, **kwargs)) if y is None else y), None

    def __getattr__(self, name: str) -> Any:
        """What the layer itself has, such as a stride, which some models read of it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def _channels(self) -> int | None:
        """Which dimension has the channels, from the last; None where it is the last."""
        base = self.get_base_layer()
        if isinstance(base, _ConvNd):
            return -1 - len(base.kernel_size)
        return 1 if isinstance(base, nn.GroupNorm | _BatchNorm) else None

    def _features_last(self, x: Tensor) -> Tensor:
        return x if self._channels is None else x.movedim(self._channels, -1)

    def _restored(self, y: Tensor) -> Tensor:
        return y if self._channels is None else y.movedim(-1, self._channels)


_CONVOLVE: dict[int, Callable[..., Tensor]] = {
    1: nn.functional.conv1d,
    2: nn.functional.conv2d,
    3: nn.functional.conv3d,
}


def empty(ranks: Sequence[int], layer: MoleLinear) -> FrozenLoras:
    """Room for LoRAs that the adapter's file is to fill.

    It is filled with NaN, so that LoRAs that were never read cannot pass for LoRAs that do nothing.
    """
    total = sum(ranks)
    A = torch.full((total, layer.in_features), torch.nan)
    return FrozenLoras(A, torch.full((layer.out_features, total), torch.nan), tuple(ranks))
