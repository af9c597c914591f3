"""One model, many LoRAs one after the other: exchanged in place, so that none needs a model of its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamella.adapters import Factors, LoraSource, map_to
from lamella.adapters.heads import fit_head, standing_in
from lamella.adapters.source import random_factors


class Put(NamedTuple):
    """How the heads of a LoRA suit the model that it was put on.

    Attributes:
        unused: modules trained whole that it does without, each with the reason.
        assumed: those whose labels are taken as the model's, in the same order, as nothing names them.
    """

    unused: dict[str, str]
    assumed: tuple[str, ...]


class Exchange:
    """The place of one LoRA on a model: ``y + s B A x`` in each module that it adapts, and its head where that fits.

    Args:
        model: the base; as it was when `installed` is left.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._factors: dict[str, Factors] = {}
        self._heads = ExitStack()

    @contextmanager
    def installed(self, modules: Mapping[str, object]) -> Iterator[None]:
        """Lets these modules, by name, add what a LoRA that is put there has for them."""
        with ExitStack() as hooks:
            for name in modules:
                hooks.enter_context(self._model.get_submodule(name).register_forward_hook(_Adding(self, name)))
            try:
                yield
            finally:
                self.clear()

    def put(self, source: LoraSource, labels: Sequence[str] = ()) -> Put:
        """Puts a LoRA in the place of the one before.

        Args:
            source: the LoRA.
            labels: the names of its labels, in its order; empty where they are not known.

        Raises:
            LamellaError: it is not for the model.
        """
        mapped = map_to(self._model, source)
        self.clear()
        fitted = {head: fit_head(self._model, head, tensors, labels) for head, tensors in mapped.whole.items()}
        for head, found in fitted.items():
            if found.tensors is not None:
                self._heads.enter_context(standing_in(self._model.get_submodule(head), found.tensors))
        self.put_factors(mapped.modules)
        unused = {head: found.why_not for head, found in fitted.items() if found.tensors is None}
        return Put(unused, tuple(head for head, found in fitted.items() if found.assumed))

    def put_factors(self, factors: Mapping[str, Factors]) -> None:
        """Puts factors in their modules, by the model's names."""
        self._factors = dict(factors)

    def clear(self) -> None:
        """Leaves the base alone."""
        self._factors = {}
        self._heads.close()

    def factors(self, module: str) -> Factors | None:
        """What the LoRA in place has for a module."""
        return self._factors.get(module)


class _Adding:
    """The hook of one module."""

    def __init__(self, exchange: Exchange, name: str) -> None:
        self._exchange, self._name = exchange, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        lora = self._exchange.factors(self._name)
        if lora is None:
            return y
        x = args[0].to(lora.A.dtype)  # (*rows, in)
        delta = nn.functional.linear(nn.functional.linear(x, lora.A.to(x.device)), lora.B.to(x.device))  # (*rows, out)
        return y + (lora.scaling * delta).to(y.dtype)


def random_like(factors: Mapping[str, Factors], seed: int = 0) -> dict[str, Factors]:
    """LoRAs of the same shapes whose directions are random and whose deltas have the same norms."""
    generator = torch.Generator().manual_seed(seed)
    return {module: Factors(*random_factors(one.A, one.B, generator), one.scaling) for module, one in factors.items()}
