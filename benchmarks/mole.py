"""One frozen linear layer with K frozen LoRAs, weighted by token or once, beside PEFT's loop over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.xlora.layer import XLoraLinearLayer
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from benchmarks.equality import Equality, compare, worst_of
from benchmarks.measure import Timed, measure_case
from benchmarks.record import Benchmark, BenchSettings, Case, Record, Say, Target
from lamella.kernels import FrozenLoras, concatenate, forward_frozen
from lamella.lab.studies.measuring import kept_megabytes

_WORDS = {
    "frozen": "the frozen layer, gradient to its input",
    "loop, by token": "PEFT's X-LoRA layer, given a weight per token and LoRA",
    "mole, by token": "lamella's, given the same weights",
    "loop, one weight": "PEFT's X-LoRA layer, given one weight per LoRA",
    "mole, one weight": "lamella's, given the same weights",
}
_PAIRS = (
    *((name, "frozen") for name in _WORDS if name != "frozen"),
    ("loop, by token", "mole, by token"),
    ("loop, one weight", "mole, one weight"),
)
# What MOLE is measured against, by the number of LoRAs: the time of PEFT's loop over lamella's by token, lamella's with
# one weight over the frozen layer, and the peak of memory over that of the smallest number.
_LEAST_GAIN = {8: 2.0, 32: 3.3}
_MOST_TIME = {8: 1.15, 32: 1.45}
_MOST_PEAK = 1.05


class MoleSettings(BenchSettings):
    """A layer of one width with every number of LoRAs of rank r."""

    tokens: int = Field(2048, ge=1)
    width: PositiveInt = 768
    num_loras: tuple[PositiveInt, ...] = (2, 8, 32, 128)
    r: PositiveInt = 8


@dataclass(frozen=True)
class _Layer:
    """A layer's forward from ``x (1, N, d)``, and the weights that it reads; the frozen one reads none."""

    forward: Callable[[Tensor, Tensor], Tensor]
    weights: Tensor

    def step(self, x: Tensor, gradient: Tensor) -> None:
        """Forward and backward; nothing stays."""
        self.forward(x, self.weights).backward(gradient)
        x.grad = self.weights.grad = None

    def kept_mb(self, x: Tensor, given: Sequence[Tensor]) -> float:
        """What a forward keeps beside what is given."""
        return kept_megabytes(lambda: self.forward(x, self.weights), [*given, self.weights])


class _Around(nn.Module):
    """All that PEFT's layer asks of the X-LoRA model around it."""

    disabled = False


def run(settings: MoleSettings, say: Say) -> list[Case]:
    """Times forward and backward of a layer for every number of LoRAs, equality first.

    The weights are leaves with a gradient: what a router costs that makes them is not in these figures.

    Raises:
        LamellaError: lamella's layer and PEFT's differ in float64.
    """
    cases = []
    for num_loras in settings.num_loras:
        say(f"K={num_loras}")
        cases.append(_case(settings, num_loras))
    return cases


def _case(settings: MoleSettings, num_loras: int) -> Case:
    peer = _peft_layer(settings, num_loras).double()
    by_token = torch.softmax(torch.randn(1, settings.tokens, num_loras, dtype=torch.float64), dim=-1)
    weights = {"by token": by_token, "one weight": by_token[0, 0].clone()}  # (1, N, K), (K,)
    x = torch.randn(1, settings.tokens, settings.width, dtype=torch.float64)
    equality = _check_equality(_layers(peer, _side_by_side(peer), weights), x)
    peer.to(settings.device, settings.torch_dtype)
    weights = {name: one.to(settings.device, settings.torch_dtype) for name, one in weights.items()}
    x = x.to(settings.device, settings.torch_dtype).requires_grad_()
    gradient, loras = torch.randn_like(x), _side_by_side(peer)
    given = [*peer.parameters(), loras.A, loras.B]
    methods = {
        name: Timed(
            _WORDS[name], partial(layer.step, x, gradient), kept_mb=partial(layer.kept_mb, x, given), live_peak=True
        )
        for name, layer in _layers(peer, loras, weights).items()
    }
    return measure_case(f"K={num_loras}", methods, _PAIRS, equality, settings)


def _peft_layer(settings: MoleSettings, num_loras: int) -> Linear:
    """PEFT's linear layer with K LoRAs whose B is not zero."""
    base = nn.Sequential(nn.Linear(settings.width, settings.width))
    config = LoraConfig(r=settings.r, lora_alpha=2 * settings.r, target_modules=["0"])
    model = get_peft_model(base, config, adapter_name="0")
    for lora in range(1, num_loras):
        model.add_adapter(str(lora), config)
    layer = model.get_submodule("base_model.model.0")
    assert isinstance(layer, Linear)
    layer.set_adapter([str(lora) for lora in range(num_loras)])
    for up in layer.lora_B.values():
        nn.init.normal_(up.weight, std=settings.r**-0.5)
    return layer.requires_grad_(False)


def _side_by_side(peer: Linear) -> FrozenLoras:
    """The layer's LoRAs as lamella holds them."""
    factors = [(peer.lora_A[name].weight, peer.lora_B[name].weight, peer.scaling[name]) for name in peer.lora_A]
    return concatenate(factors, factors[0][0].dtype)


def _layers(peer: Linear, loras: FrozenLoras, weights: Mapping[str, Tensor]) -> dict[str, _Layer]:
    """All methods around the same frozen layer and the same LoRAs."""
    base = peer.base_layer
    assert isinstance(base, nn.Linear)
    config = XLoraConfig(hidden_size=base.in_features, adapters=dict.fromkeys(peer.lora_A, ""))
    loop = XLoraLinearLayer(_Around(), peer, peer.forward, 0, config)

    def ours(x: Tensor, given: Tensor) -> Tensor:
        return forward_frozen(base, (base.weight, base.bias), x, given, loras)

    def theirs(x: Tensor, given: Tensor) -> Tensor:
        return loop.forward(x, scalings=given[..., None, :] if given.dim() == 3 else given[None, None, None])

    layers = {"frozen": _Layer(lambda x, _: base(x), torch.empty(0))}
    for name, one in weights.items():
        leaf = one.detach().requires_grad_()
        layers |= {f"loop, {name}": _Layer(theirs, leaf), f"mole, {name}": _Layer(ours, leaf)}
    return layers


def _check_equality(layers: Mapping[str, _Layer], x: Tensor) -> Equality:
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        leaf = x.clone().requires_grad_()
        output = layer.forward(leaf, layer.weights)
        output.square().sum().backward()
        assert leaf.grad is not None
        tensors[name] = {"output": output.detach(), "gradient of x": leaf.grad}
        if layer.weights.grad is not None:
            tensors[name]["gradient of the weights"] = layer.weights.grad
            layer.weights.grad = None
    return worst_of([compare(tensors[f"mole, {how}"], tensors[f"loop, {how}"]) for how in ("by token", "one weight")])


def targets(record: Record) -> Sequence[Target]:
    """The gain over PEFT's loop, the cost over the frozen layer, and memory that does not grow with the LoRAs."""
    figures = []
    for case, loras in zip(record.cases, record.settings["num_loras"], strict=True):
        gain, once = case.ratio("loop, by token", "mole, by token"), case.ratio("loop, one weight", "mole, one weight")
        time = case.ratio("mole, one weight", "frozen")
        figures.append(Target(f"{case.name}: loop / mole, by token", gain, least=_LEAST_GAIN.get(loras)))
        figures.append(Target(f"{case.name}: loop / mole, one weight", once))
        figures.append(Target(f"{case.name}: mole / frozen, one weight", time, most=_MOST_TIME.get(loras)))
    first, *others = record.cases
    for case in others:
        for method in ("mole, by token", "mole, one weight"):
            peak, least = case.method(method).peak_mb, first.method(method).peak_mb
            assert peak is not None
            assert least is not None
            words = f"{case.name}: peak memory, {method} / the same at {first.name}"
            figures.append(Target(words, peak / least, most=_MOST_PEAK))
    return figures


def shape(settings: dict[str, Any]) -> str:
    """What was measured, in words."""
    return f"one layer of {settings['width']}, r={settings['r']}, {settings['tokens']:,} tokens, none of them padding"


_QUICK = {"rounds": 2, "tokens": 32, "width": 16, "num_loras": (2, 5), "r": 2}
MOLE = Benchmark(MoleSettings, _QUICK, run, targets, shape)
