"""What lamella must know of a family of mixture-of-experts models, and the families it knows."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lamella.backbones.moe.expert import Expert
from lamella.backbones.moe.interventions import put, replace_experts, restrict_router, restricted
from lamella.backbones.moe.masking import Scored, Without
from lamella.errors import LamellaError
from lamella.routing import Routing

FAMILIES: list["MoEFamily"] = []
Callables = Mapping[int, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class NativeRouting(Routing):
    """A native router's decision; its probabilities need not be a softmax over its logits.

    Attributes:
        weights: what each expert's output is multiplied by, ``(N, k)``: they need not sum to 1, and are 0 where an
            expert had no room.
        scores: what the router calls an expert's probability, normalised over the experts, ``(N, E)``; None where
            that is a softmax over the logits.
        kept: False where an expert was chosen but had no room for the token, ``(N, k)``; None where that cannot be.
        skipped: True where the router chose none of the experts, but to pass the token on, ``(N, k)``; ``kept`` is
            False there, and the index means nothing. None where that cannot be.
    """

    scores: Tensor | None = None
    kept: Tensor | None = None
    skipped: Tensor | None = None

    @property
    def probs(self) -> Tensor:
        """The normalised scores, ``(N, E)``."""
        return super().probs if self.scores is None else self.scores


class MoEFamily:
    """How the module that holds a router and its experts is read, and how it is changed.

    A family is a subclass with an instance in ``FAMILIES``; it overrides what differs from a router that puts out
    logits, weights and indices, beside experts whose forward is given hidden states, indices and weights. Routings are
    read as the model made them, in training too (with its jitter and its sampling); ``Expert`` leaves out dropout.
    """

    sparse: ClassVar[tuple[str, ...]] = ()  # class names of the module that holds router and experts
    native: ClassVar[bool] = True  # whether the model came with them, instead of an adapter
    pools: ClassVar[bool] = True  # whether its experts' forward is given indices and weights, so that a pool can be
    routers: ClassVar[tuple[str, ...]] = ("gate", "router")  # what the router may be called

    def holds(self, module: nn.Module) -> bool:
        """Whether this module holds a router and experts of the family."""
        return type(module).__name__ in self.sparse

    def of(self, sparse: nn.Module) -> "MoEFamily | None":
        """The family as it is for this module; None where the module routes nothing."""
        return self

    def router(self, sparse: nn.Module) -> nn.Module:
        """The module that scores the experts."""
        return next(module for name in self.routers if (module := sparse._modules.get(name)) is not None)

    def experts(self, sparse: nn.Module) -> nn.Module:
        """The module that holds the experts."""
        return sparse.get_submodule("experts")

    def num_experts(self, sparse: nn.Module) -> int:
        """Number of experts, E."""
        return int(bare(self.experts(sparse)).num_experts)

    def top_k(self, sparse: nn.Module) -> int:
        """How many experts a token gets."""
        return int(bare(self.router(sparse)).top_k)

    def columns(self, sparse: nn.Module) -> int:
        """How many logits the router computes: one for each expert, then those for whatever else it can choose."""
        return self.num_experts(sparse)

    def expert(self, sparse: nn.Module, index: int) -> Expert:
        """One expert, by views of the module's parameters."""
        raise NotImplementedError

    def shared(self, sparse: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What the module puts out where its experts give nothing, ``(N, h) -> (N, h)``; None where that is nothing."""
        own = {id(one) for part in (self.router(sparse), self.experts(sparse)) for one in part.parameters()}
        if own == {id(one) for one in sparse.parameters()}:
            return None

        def beside(x: Tensor) -> Tensor:
            with put(self.experts(sparse), "forward", lambda _: _nothing):
                output = sparse.forward(x[None])
            first: Tensor = output[0] if isinstance(output, tuple) else output
            return first.view(x.shape)

        return beside

    def read(self, sparse: nn.Module, output: Any, selected: Tensor, weights: Tensor) -> NativeRouting:
        """The decision, for the N tokens of all sequences.

        Args:
            sparse: the module that holds both.
            output: what the router put out.
            selected: what its experts were given as the second argument.
            weights: what they were given as the third.
        """
        logits = widen(output[0])
        return NativeRouting(logits, weights.to(logits.dtype), selected)

    def route(self, sparse: nn.Module, x: Tensor) -> NativeRouting:
        """The router's decision for tokens ``x (N, h)`` or ``(batch, tokens, h)``."""
        told: list[NativeRouting] = []

        def tell(_: Tensor, routing: NativeRouting) -> None:
            told.append(routing)

        with self.watched(sparse, tell), put(self.experts(sparse), "forward", lambda _: _nothing):
            sparse.forward(x.clone() if x.dim() == 3 else x[None].clone())  # some add noise in place, in training
        return told[0]

    def chosen(self, selected: Tensor) -> tuple[Tensor, Tensor | None]:
        """Indices ``(N, k)``, and which were kept, in what the experts' forward is given as its second argument."""
        return selected, None

    @contextmanager
    def watched(self, sparse: nn.Module, tell: Callable[[Tensor, NativeRouting], None]) -> Iterator[None]:
        """Inside the context, ``tell`` gets what the experts are given, and what the router decides.

        The tokens are ``(batch, tokens, h)`` where the module that holds both is given them so, ``(N, h)`` otherwise.
        """
        given: dict[str, Any] = {}

        def enter(_: nn.Module, args: Any) -> None:
            if args and args[0].dim() == 1:
                raise LamellaError(
                    f"This {type(sparse).__name__} is given some of the tokens, those of one modality, and not which; "
                    "give text without images."
                )
            given["shape"] = args[0].shape[:2] if args and args[0].dim() == 3 else None

        def scoring(forward: Any) -> Any:
            def score(*args: Any, **kwargs: Any) -> Any:
                with Scored(self.columns(sparse)) as scored:
                    given["output"] = forward(*args, **kwargs)
                given["scores"] = scored.scores
                return given["output"]

            return score

        def see(_: nn.Module, args: Any) -> None:
            with torch.no_grad():
                x = args[0].detach()
                if given.get("shape") is not None and given["shape"].numel() * x.shape[-1] == x.numel():
                    x = x.view(*given["shape"], x.shape[-1])
                routing = self.read(sparse, given.pop("output"), *args[1:3])
                if given["scores"] is not None:
                    scores = given["scores"][:, : routing.num_experts].to(routing.logits.dtype)  # (N, E)
                    routing = replace(routing, scores=scores / scores.sum(dim=-1, keepdim=True))
                tell(x, routing)

        handles = [
            sparse.register_forward_pre_hook(enter),
            self.experts(sparse).register_forward_pre_hook(see),
        ]
        try:
            with put(self.router(sparse), "forward", scoring):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def replaced(self, sparse: nn.Module, experts: Callables) -> AbstractContextManager[None]:
        """Inside the context, tokens of these experts go to these callables."""
        return replace_experts(self.experts(sparse), self.chosen, experts)

    def masked(self, sparse: nn.Module, experts: Collection[int]) -> AbstractContextManager[None]:
        """Inside the context, the router cannot choose these experts.

        Raises:
            LamellaError: it chooses one all the same, because it does not choose by its scores.
        """

        return _masked(self, sparse, experts)

    def masks(self, sparse: nn.Module) -> frozenset[int]:
        """The experts that the router may not choose now."""
        return restricted(self.router(sparse))

    def deciding_again(self, sparse: nn.Module, closed: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """Inside the context, the router decides a second time, for each token without the experts closed to it.

        Args:
            sparse: the module that holds router and experts.
            closed: asked when the first decision has been taken, ``(N, E)``.
        """
        return _deciding_again(self, sparse, closed)

    def handed(self, sparse: nn.Module, output: Any) -> tuple[Tensor, Tensor]:
        """The experts' second and third argument, from what the router puts out."""
        return output[2], output[1]


@contextmanager
def _masked(family: MoEFamily, sparse: nn.Module, experts: Collection[int]) -> Iterator[None]:
    def again(original: Any, masked: frozenset[int], *args: Any, **kwargs: Any) -> Any:
        if not masked:
            return original(*args, **kwargs)
        closed = torch.zeros(family.num_experts(sparse), dtype=torch.bool, device=args[0].device)
        closed[sorted(masked)] = True
        with Without(closed, family.columns(sparse)):
            return original(*args, **kwargs)

    def check(_: Tensor, routing: NativeRouting) -> None:
        masked = torch.isin(routing.indices, torch.tensor(sorted(family.masks(sparse)), device=routing.indices.device))
        if (masked if routing.kept is None else masked & routing.kept).any():
            raise LamellaError(
                f"The {type(bare(family.router(sparse))).__name__} of this {type(sparse).__name__} does not choose "
                "experts by scores that it takes the largest of, so none can be masked; replace the expert instead."
            )

    with restrict_router(family.router(sparse), "forward", again, experts), family.watched(sparse, check):
        yield


@contextmanager
def _deciding_again(family: MoEFamily, sparse: nn.Module, closed: Callable[[], Tensor]) -> Iterator[None]:
    router, given = family.router(sparse), {}

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        given["args"], given["kwargs"] = args, kwargs

    def decide(_: nn.Module, args: Any) -> Any:
        with Without(closed(), family.columns(sparse)):
            output = router.forward(*given["args"], **given["kwargs"])
        return args[0], *family.handed(sparse, output)

    experts = family.experts(sparse)
    with router.register_forward_pre_hook(keep, with_kwargs=True), experts.register_forward_pre_hook(decide):
        yield


def _nothing(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What no expert adds to hidden states."""
    return torch.zeros_like(hidden)


def bare(module: nn.Module) -> Any:
    """The model's own module inside PEFT's wrappers, which do not answer for what it knows."""
    while isinstance(module, BaseTunerLayer):
        module = module.base_layer
    return module


def register(family: type[MoEFamily]) -> type[MoEFamily]:
    """Makes a family known; a class decorator."""
    FAMILIES.append(family())
    return family


def without(logits: Tensor, masked: Collection[int]) -> Tensor:
    """The logits ``(..., E)`` with -inf for the masked experts."""
    return logits.index_fill(-1, torch.tensor(sorted(masked), dtype=torch.long, device=logits.device), -torch.inf)


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
