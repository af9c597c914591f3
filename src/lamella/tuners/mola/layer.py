"""One linear module with its LoRA experts and its router."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lamella.backbones import Place
from lamella.backbones.offloading import is_sharded, onloaded
from lamella.errors import CannotMergeError, LamellaError
from lamella.kernels import FEW, choose_form, mix_dense, mix_few, mix_sorted, project
from lamella.routing import (
    Frame,
    Projection,
    Router,
    RouterLoss,
    Routing,
    attach,
    current_frame,
    make_router,
    refuse_reentrant_collection,
)
from lamella.tuners.bypassing import note_call
from lamella.tuners.mola.config import MolaConfig
from lamella.tuners.mola.segments import segments
from lamella.tuners.routed import AttachedLoss, RoutedLayer
from lamella.tuners.tensors import AdapterLayer, AdapterTensors, is_plain


@dataclass(frozen=True)
class _Experts:
    """One adapter's settings in this module."""

    num_experts: int
    top_k: int
    r: int
    scaling: float
    dropout: float
    start: Literal["svd", "goat"] | None
    router_aux_loss_coef: float
    router_z_loss_coef: float

    @property
    def is_dense(self) -> bool:
        if torch.compiler.is_compiling():  # how many tokens chose an expert is no shape that can be compiled
            return True
        if self.start is None:
            return choose_form(self.num_experts, self.r, self.top_k) == "dense"
        # The starts are as many experts again, each chosen with its own, or all of them by every token.
        return self.start == "goat" or choose_form(2 * self.num_experts, self.r, 2 * self.top_k) == "dense"


class MolaLinear(nn.Module, AdapterLayer):
    """``y = W0 x + s * sum_{e in top-k} g_e B_e A_e x`` (MoLA eq. 3-4), with one expert and no router as plain LoRA.

    Tensors per adapter, as a file calls them: ``lamella_mola_lora_A (E, r, in)``, or ``(1, r, in)`` where experts share
    it, ``lamella_mola_lora_B (E, out, r)``, ``lamella_mola_router.weight (E, in)``; no router where E is 1. Where what
    experts started from is subtracted, it is in ``lamella_mola_start_A`` and ``lamella_mola_start_B``, which do not
    train: of each expert under its own weight ("svd"), or the mean of all ("goat").
    PEFT sees from "Linear" in the class's name that a further adapter's "all-linear" means this layer too.
    """

    adapter_layer_names: tuple[str, ...] = (
        "lamella_mola_lora_A", "lamella_mola_lora_B", "lamella_mola_start_A", "lamella_mola_start_B",
        "lamella_mola_router",
    )  # fmt: skip
    other_param_names: tuple[str, ...] = ("experts", "balance_share", "lamella_mola_dropout")

    def __init__(self, base_layer: nn.Module, place: Place) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.place = place
        self.lamella_mola_lora_A = AdapterTensors()
        self.lamella_mola_lora_B = AdapterTensors()
        self.lamella_mola_start_A = AdapterTensors()
        self.lamella_mola_start_B = AdapterTensors()
        self.lamella_mola_router = nn.ModuleDict()
        self.lamella_mola_dropout = nn.ModuleDict()
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.experts: dict[str, _Experts] = {}
        self.balance_share: dict[str, float] = {}
        # The modules given the same input as this one, in the order they run, this one among them. A list, so that
        # they are not registered as submodules.
        self.same_input: list[MolaLinear] = [self]
        self.merged_adapters: list[str] = []
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        assert in_features is not None  # the tuner lets only linear modules through
        assert out_features is not None
        self.in_features, self.out_features = in_features, out_features

    def update_layer(self, adapter: str, config: MolaConfig, num_experts: int, top_k: int) -> None:
        """Gives this module the experts of an adapter."""
        self.experts[adapter] = _Experts(
            num_experts, top_k, config.r, config.scaling, config.expert_dropout, config.start,
            config.router_aux_loss_coef, config.router_z_loss_coef,
        )  # fmt: skip
        A = torch.empty(1 if config.share_lora_a else num_experts, config.r, self.in_features)
        B = torch.zeros(num_experts, self.out_features, config.r)
        for expert in range(num_experts):
            if expert < len(A):
                nn.init.kaiming_uniform_(A[expert], a=math.sqrt(5))
            if not config.init_lora_weights:
                nn.init.kaiming_uniform_(B[expert], a=math.sqrt(5))
        if config.start is not None:
            # Where numbers are to be loaded, or there are none, none are computed.
            if not (config.inference_mode or self.get_base_layer().weight.is_meta):
                A, B = segments(self.get_base_layer(), self.name, num_experts, config.r, config.scaling)
            self.lamella_mola_start_A.put(adapter, A.clone())
            self.lamella_mola_start_B.put(adapter, B.clone())
            # Parameters, as the factors are, so that whatever casts these casts what is subtracted from them alike.
            self.frozen_peft_weight_names[adapter] = ("lamella_mola_start_A", "lamella_mola_start_B")
        self.lamella_mola_lora_A.put(adapter, A)
        self.lamella_mola_lora_B.put(adapter, B)
        self.lamella_mola_dropout[adapter] = nn.Dropout(config.lora_dropout)
        if num_experts > 1:
            self.lamella_mola_router[adapter] = make_router(
                config.router, self.in_features, num_experts, mixing_weights=config.mixing_weights
            )
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Maps ``x (..., in)`` to ``(..., out)``."""
        frame = current_frame()
        note_call(self, frame)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for adapter in self.active_adapters:
            if adapter in self.experts:
                y = self._add_experts(adapter, x, y, frame)
        return y

    def _add_experts(self, adapter: str, x: Tensor, y: Tensor, frame: Frame | None) -> Tensor:
        with onloaded(*self.held(adapter)):
            mix = self._mix_few if self._are_few(adapter, x) else self._mix
            return mix(adapter, x, y, frame).view(y.shape).to(y.dtype)

    def _are_few(self, adapter: str, x: Tensor) -> bool:
        """Whether tokens are so few, as in decoding, that what prepares a large GEMM costs more than it saves."""
        if self.training or torch.is_grad_enabled():
            return False
        tokens, experts = x.numel() // self.in_features, self.experts[adapter]
        if experts.start is not None:
            return False
        if torch.compiler.is_compiling():  # for any number of tokens but one there is one graph
            return tokens == 1
        return tokens == 1 or (1 < tokens <= FEW and experts.is_dense)

    def _mix_few(self, adapter: str, x: Tensor, y: Tensor, frame: Frame | None) -> Tensor:
        experts, (A, B), weights, indices = self.experts[adapter], self.factors(adapter), None, None
        dtype = _compute_dtype(x, A)
        flat_x, flat_y = self._flat(x, dtype), y.reshape(-1, self.out_features)  # (N, in), (N, out)
        routing = self._route(adapter, x, self._router_product(adapter, flat_x), frame)
        if routing is not None:
            weights, indices = routing.weights, routing.indices  # (N, k)
        if not A.dtype == y.dtype == dtype:
            return mix_few(flat_y.to(dtype), flat_x, weights, indices, A.to(dtype), B.to(dtype), experts.scaling)
        return mix_few(flat_y, flat_x, weights, indices, A, B, experts.scaling)

    def _mix(self, adapter: str, x: Tensor, y: Tensor, frame: Frame | None) -> Tensor:
        scaling = self.experts[adapter].scaling
        dtype = _compute_dtype(x, self.lamella_mola_lora_A.of(adapter))
        h, logits = self._project(adapter, x, dtype, frame)  # (N, J*r), (N, r) or None; (N, E) or None
        B = self._up(adapter).to(dtype)  # (J, out, r)
        routing = self._route(adapter, x, logits, frame)
        flat_y = y.reshape(-1, self.out_features)  # (N, out)
        in_place = y.dtype == dtype and self._owns_its_output
        if h is not None:
            mixed = mix_dense(flat_y.to(dtype), h, self.weights(adapter, routing), B, scaling, in_place)
        else:
            assert routing is not None  # the sorted form is for many experts
            dropped = self._flat(self.lamella_mola_dropout[adapter](x), dtype)
            weights, indices = routing.weights, routing.indices  # (N, k)
            if self.starts(adapter):  # each expert's own follows it
                weights = torch.cat((weights, weights), dim=-1)  # (N, 2k)
                indices = torch.cat((indices, indices + routing.num_experts), dim=-1)  # (N, 2k)
            A = self._all_A(adapter).to(dtype).expand(len(B), -1, -1)  # (J, r, in)
            mixed = mix_sorted(flat_y.to(dtype), dropped, weights, indices, A, B, scaling, in_place)
        return mixed

    @property
    def _owns_its_output(self) -> bool:
        """Whether nobody but this layer can hold what the base layer returned, so that it may be added into."""
        return not torch.compiler.is_compiling() and is_plain(self.base_layer)

    def _flat(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        flat = x.reshape(-1, self.in_features)  # (N, in)
        return flat if flat.dtype is dtype else flat.to(dtype)

    def _project(
        self, adapter: str, x: Tensor, dtype: torch.dtype, frame: Frame | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """``A x`` of all experts where the form is dense, and the router's product where there is one."""
        shared = frame.projections.pop((self, adapter), None) if frame is not None else None
        if shared is not None and shared.x is x:
            return shared.down, shared.scores
        dropout = self.lamella_mola_dropout[adapter]
        assert isinstance(dropout, nn.Dropout)
        if self.training and dropout.p > 0:
            h = None
            if self.experts[adapter].is_dense:
                (h,) = project(self._flat(dropout(x), dtype), self._down(adapter, dtype))
            return h, self._router_product(adapter, self._flat(x, dtype))
        # The first of the modules that share this input computes for all of them, in one GEMM.
        factors = {self: self._read_by(adapter, dtype)}
        if frame is not None and shared is None:
            for layer in self._sharing(adapter):
                read = layer._read_by(adapter, dtype)
                if all(factor.device == x.device for factor in read):  # not of a layer that is offloaded or elsewhere
                    factors[layer] = read
        flat = [factor for of_layer in factors.values() for factor in of_layer]
        products = iter(project(self._flat(x, dtype), flat) if flat else [])
        results = [
            (next(products) if layer.experts[adapter].is_dense else None, _next_if(products, layer, adapter))
            for layer in factors
        ]
        for layer, (h, product) in list(zip(factors, results, strict=True))[1:]:
            assert frame is not None
            frame.projections[layer, adapter] = Projection(x, h, product)
        return results[0]

    def _sharing(self, adapter: str) -> "list[MolaLinear]":
        """The layers after this one that are given the same input and can take part in its GEMM."""
        after = self.same_input[self.same_input.index(self) + 1 :]
        return [
            layer
            for layer in after
            if adapter in layer.experts
            and adapter in layer.active_adapters
            and not layer.disable_adapters
            and not is_sharded(layer.lamella_mola_lora_A.of(adapter))  # FSDP2 gathers a layer when its own turn comes
        ]

    def _read_by(self, adapter: str, dtype: torch.dtype) -> list[Tensor]:
        """What the input is multiplied by before anything is decided."""
        return self._down(adapter, dtype) + self._router_weight(adapter, dtype)

    def _down(self, adapter: str, dtype: torch.dtype) -> list[Tensor]:
        if not self.experts[adapter].is_dense:
            return []
        return [self._all_A(adapter).to(dtype).reshape(-1, self.in_features)]  # (J*r, in), or (r, in)

    def starts(self, adapter: str) -> tuple[Tensor, ...]:
        """What the experts started from and is subtracted, ``A (E, r, in)`` and ``B (E, out, r)``; or nothing."""
        if adapter not in self.lamella_mola_start_A:
            return ()
        return self.lamella_mola_start_A.of(adapter), self.lamella_mola_start_B.of(adapter)

    def _all_A(self, adapter: str) -> Tensor:
        """Of the experts and, behind them, of what is subtracted: J in all, ``(J, r, in)``; or ``(1, r, in)``."""
        A, starts = self.lamella_mola_lora_A.of(adapter), self.starts(adapter)
        return torch.cat((A, starts[0])) if starts else A

    def _up(self, adapter: str) -> Tensor:
        """B in the same order, ``(J, out, r)``."""
        B, starts = self.lamella_mola_lora_B.of(adapter), self.starts(adapter)
        return torch.cat((B, -starts[1])) if starts else B

    def _router_weight(self, adapter: str, dtype: torch.dtype) -> list[Tensor]:
        if adapter not in self.lamella_mola_router:
            return []
        weight = self._router(adapter).weight  # (E, in)
        return [weight if weight.dtype is dtype else weight.to(dtype)]

    def _router_product(self, adapter: str, flat_x: Tensor) -> Tensor | None:
        weight = self._router_weight(adapter, flat_x.dtype)
        return project(flat_x, weight)[0] if weight else None

    def _route(self, adapter: str, x: Tensor, product: Tensor | None, frame: Frame | None) -> Routing | None:
        """The weights to mix by: the router's decision, in training without the experts that are dropped."""
        if product is None:
            return None
        routing = self._decide(adapter, x, product, frame)
        dropout = self.experts[adapter].dropout
        if not (self.training and dropout):
            return routing
        return Routing(routing.logits, torch.dropout(routing.weights, dropout, train=True), routing.indices)

    def _decide(self, adapter: str, x: Tensor, product: Tensor, frame: Frame | None) -> Routing:
        """The router's decision, with its balance loss attached and its observers told."""
        experts = self.experts[adapter]
        router = self._router(adapter)
        routing = router.route(router.logits(x.reshape(-1, self.in_features), product), experts.top_k)
        trains = (
            self.training
            and router.weight.requires_grad
            and (experts.router_aux_loss_coef > 0 or experts.router_z_loss_coef > 0)
        )
        if not trains and (frame is None or not frame.observers):
            return routing
        mask = None if frame is None else self._tell(adapter, x, routing, frame)
        return self._attach_losses(adapter, routing, mask, frame) if trains else routing

    def _tell(self, adapter: str, x: Tensor, routing: Routing, frame: Frame) -> Tensor | None:
        """Tells the observers what was decided; returns which tokens are real, ``(N,)``."""
        mask = frame.token_mask(x, self.place.reads_encoder, self.name)
        for observe in frame.observers:
            observe(self, adapter, routing, mask, x.shape[:-1])
        return mask

    def _attach_losses(self, adapter: str, routing: Routing, mask: Tensor | None, frame: Frame | None) -> Routing:
        refuse_reentrant_collection(frame)
        if not torch.is_grad_enabled():
            return routing
        if frame is None:
            raise LamellaError(
                f"{self.name} trains outside a forward of its model, where padding and the scale of the task loss are "
                "unknown to its balance loss. Call the model itself, checkpoint with "
                "gradient_checkpointing_enable(), or "
                "set router_aux_loss_coef=0 and router_z_loss_coef=0."
            )
        experts, share = self.experts[adapter], self.balance_share[adapter]
        loss = RouterLoss(experts.router_aux_loss_coef * share, experts.router_z_loss_coef * share)
        others = (routing.indices, mask)
        weights = attach(routing.weights, routing.logits, loss.value, loss.gradient, others, frame, self.name)
        return Routing(routing.logits, weights, routing.indices)

    @property
    def name(self) -> str:
        """The module's dotted name in the model."""
        return self.place.name

    def _router(self, adapter: str) -> Router:
        router = self.lamella_mola_router[adapter]
        assert isinstance(router, Router)
        return router

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """What trains of an adapter's experts: ``A (E, r, in)``, or ``(1, r, in)``, and ``B (E, out, r)``."""
        return self.lamella_mola_lora_A.of(adapter), self.lamella_mola_lora_B.of(adapter)

    def mixed(self, adapter: str) -> tuple[Tensor, Tensor]:
        """All that an adapter's `weights` multiply: the E experts and, behind them, E starts that are subtracted.

        Returns:
            ``A (J, r, in)`` and ``B (J, out, r)``; J is E where nothing is subtracted.
        """
        B = self._up(adapter)
        return self._all_A(adapter).expand(len(B), -1, -1), B

    def weights(self, adapter: str, routing: Routing | None) -> Tensor | None:
        """Of `mixed`, by token, ``(N, J)``; None is weight one, where there is no router."""
        if routing is None:
            return None
        weights = routing.dense_weights()  # (N, E)
        start = self.experts[adapter].start
        if start is None:
            return weights
        of_starts = weights if start == "svd" else torch.full_like(weights, 1 / routing.num_experts)
        return torch.cat((weights, of_starts), dim=-1)

    def expert_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """What each expert of an adapter is as a LoRA, with what is subtracted from it.

        As the weights of a token sum to one, what is subtracted from the sum may be so from each expert.

        Returns:
            ``A (E, rank, in)`` and ``B (E, out, rank)``, rank at least r.
        """
        A, B = self.mixed(adapter)
        if not (starts := self.starts(adapter)):
            return A, B
        count = len(starts[0])
        (A, start_A), (B, start_B) = A.split(count), B.split(count)
        if self.experts[adapter].start == "goat":  # the mean of all
            start_A = start_A.flatten(0, 1).expand(count, -1, -1)  # (E, E*r, in)
            start_B = start_B.permute(1, 0, 2).flatten(1).div(count).expand(count, -1, -1)  # (E, out, E*r)
        return torch.cat((A, start_A), dim=1), torch.cat((B, start_B), dim=2)

    def not_its_own(self, adapter: str) -> str | None:
        """Why an expert is more than tensors of its own, in words that follow *the experts of ...*; None where not."""
        A, B = self.factors(adapter)
        if len(A) < len(B):
            return "share one A"
        return "are differences from what they started from" if self.starts(adapter) else None

    def is_as_started(self, adapter: str) -> bool:
        """Whether experts from which something is subtracted are still what they started from."""
        starts = self.starts(adapter)
        with onloaded(*self.held(adapter)):
            return bool(starts) and all(map(torch.equal, self.factors(adapter), starts))

    def held(self, adapter: str) -> list[nn.Module]:
        """The modules that hold the tensors of an adapter, none of which is called."""
        own: Any = self._modules  # sooner asked than by attribute, at each token
        held = (own[name]._modules.get(adapter) for name in self.adapter_layer_names)
        return [module for module in held if module is not None]

    def routed(self, adapter: str) -> bool:
        """Whether this module has a router for the adapter."""
        return adapter in self.lamella_mola_router

    def routed_layer(self, adapter: str) -> RoutedLayer | None:
        """The adapter's router and experts here, for `lamella.tuners.routed.RoutedModule`."""
        if not self.routed(adapter):
            return None
        experts = self.experts[adapter]
        loss = None
        if experts.router_aux_loss_coef > 0 or experts.router_z_loss_coef > 0:
            settings = (
                f"router_aux_loss_coef={experts.router_aux_loss_coef:g}, "
                f"router_z_loss_coef={experts.router_z_loss_coef:g}"
            )
            balance_is_flat = experts.top_k == experts.num_experts  # every expert gets every token
            loss = AttachedLoss(self.name, settings, is_flat=balance_is_flat and not experts.router_z_loss_coef)
        return RoutedLayer(
            self, self.name, self.place, adapter, self.lamella_mola_router[adapter], experts.num_experts, experts.top_k,
            factors=self.factors(adapter), experts=lambda: self.expert_factors(adapter), scaling=experts.scaling,
            starts=self.starts(adapter) if experts.start == "svd" else (), loss=loss,
        )  # fmt: skip

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether this module is a plain LoRA, for PEFT's ``convert_to_lora``: one expert, and no router."""
        return adapter_name in self.experts and not self.routed(adapter_name)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What one expert adds to the base's weight, in its shape ``(out, in)``, or ``(in, out)`` in a Conv1D.

        Raises:
            CannotMergeError: a router chooses among several experts.
        """
        if not self.supports_lora_conversion(adapter_name):
            self.merge()
        with onloaded(*self.held(adapter_name)):
            A, B = (factor.detach()[0] for factor in self.expert_factors(adapter_name))
        delta = self.experts[adapter_name].scaling * (B @ A)  # (out, in)
        return delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        raise CannotMergeError(
            f"MoLA chooses experts per token, so {self.name} has no single weight to merge into its base. Use "
            "lamella.collapse(model, batches) for one plain LoRA with measured error, or lamella.export_experts(model, "
            "folder) for each expert as a LoRA. A trainer that syncs weights by merging (TRL with vLLM) needs the "
            "collapsed LoRA."
        )

    def unmerge(self) -> None:
        raise CannotMergeError(f"{self.name} is never merged, so there is nothing to unmerge.")

    def __repr__(self) -> str:
        return "mola." + super().__repr__()


def _next_if(products: Iterator[Tensor], layer: MolaLinear, adapter: str) -> Tensor | None:
    return next(products) if layer.routed(adapter) else None


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The precision of the experts' GEMMs: autocast's where it is on, otherwise the adapter's own, as in PEFT."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype
