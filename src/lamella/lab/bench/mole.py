"""One frozen linear layer with K frozen LoRAs, weighted by token or once, beside PEFT's loop over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn

from lamella.kernels import FrozenLoras, concatenate, forward_frozen
from lamella.lab.bench.equality import Equality, compare, worst_of
from lamella.lab.bench.memory import peak_live_megabytes, peak_megabytes
from lamella.lab.bench.results import Arm, BenchResult, Case
from lamella.lab.bench.settings import MoleSettings
from lamella.lab.studies.measuring import clock_for, kept_megabytes, ratio, time_rounds, using_threads

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


@dataclass(frozen=True)
class _Layer:
    """A layer's forward from ``x (1, N, d)``, and the weights that it reads, None for the frozen one."""

    forward: Callable[[Tensor, Tensor], Tensor]
    weights: Tensor

    def step(self, x: Tensor, gradient: Tensor) -> None:
        """Forward and backward; nothing stays."""
        self.forward(x, self.weights).backward(gradient)
        x.grad = self.weights.grad = None


class _Around(nn.Module):
    """All that PEFT's layer asks of the X-LoRA model around it."""

    disabled = False


def bench_mole(settings: MoleSettings, starting: Callable[[str], object] = lambda _: None) -> BenchResult:
    """Times forward and backward of a layer for every number of LoRAs, equality first.

    The weights are leaves with a gradient: what a router costs that makes them is not in these figures.

    Args:
        settings: width, numbers and rank of the LoRAs, rounds, threads, precision and device.
        starting: told which layer begins.

    Raises:
        LamellaError: lamella's layer and PEFT's differ in float64.
    """
    torch.manual_seed(0)
    cases = []
    with using_threads(settings.threads):
        for num_loras in settings.num_loras:
            starting(f"K={num_loras}")
            cases.append(_measure(settings, num_loras))
    clock = clock_for(settings.threads, settings.device)
    return BenchResult(bench="mole", settings=settings.model_dump(mode="json"), clock=clock, cases=cases)


def _measure(settings: MoleSettings, num_loras: int) -> Case:
    peer = _peft_layer(settings, num_loras).double()
    by_token = torch.softmax(torch.randn(1, settings.tokens, num_loras, dtype=torch.float64), dim=-1)
    weights = {"by token": by_token, "one weight": by_token[0, 0].clone()}  # (1, N, K), (K,)
    x = torch.randn(1, settings.tokens, settings.width, dtype=torch.float64)
    equality = _check_equality(_layers(peer, _side_by_side(peer), weights), x)
    peer.to(settings.device, settings.torch_dtype)
    weights = {name: one.to(settings.device, settings.torch_dtype) for name, one in weights.items()}
    x = x.to(settings.device, settings.torch_dtype).requires_grad_()
    gradient = torch.randn_like(x)
    loras = _side_by_side(peer)
    layers = _layers(peer, loras, weights)
    steps = {name: _step(layer, x, gradient) for name, layer in layers.items()}
    seconds = time_rounds(steps, settings.rounds, clock_for(settings.threads, settings.device))
    given = [*peer.parameters(), loras.A, loras.B]
    peak = peak_live_megabytes if settings.device == "cpu" else peak_megabytes
    arms = [
        Arm.of(name, _WORDS[name], seconds[name], 0, _kept(layer, x, given), peak(steps[name]))
        for name, layer in layers.items()
    ]
    return Case(
        name=f"K={num_loras}",
        arms=arms,
        equality=equality,
        ratios=[ratio(seconds, arm, over) for arm, over in _PAIRS],
    )


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
    """All arms around the same frozen layer and the same LoRAs."""
    base = peer.base_layer
    assert isinstance(base, nn.Linear)
    config = XLoraConfig(hidden_size=base.in_features, adapters=dict.fromkeys(peer.lora_A, ""))
    loop = XLoraLinearLayer(_Around(), peer, peer.forward, 0, config)

    def ours(x: Tensor, own: Tensor) -> Tensor:
        return forward_frozen(base, (base.weight, base.bias), x, own, loras)

    def theirs(x: Tensor, own: Tensor) -> Tensor:
        return loop.forward(x, scalings=own[..., None, :] if own.dim() == 3 else own[None, None, None])

    leaves = {name: one.detach().requires_grad_() for name, one in weights.items()}
    layers = {"frozen": _Layer(lambda x, _: base(x), torch.empty(0))}
    for name, leaf in leaves.items():
        layers |= {f"loop, {name}": _Layer(theirs, leaf), f"mole, {name}": _Layer(ours, leaf)}
    return layers


def _check_equality(layers: Mapping[str, _Layer], x: Tensor) -> Equality:
    found: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        own = x.clone().requires_grad_()
        output = layer.forward(own, layer.weights)
        output.square().sum().backward()
        assert own.grad is not None
        found[name] = {"output": output.detach(), "gradient of x": own.grad}
        if layer.weights.grad is not None:
            found[name]["gradient of the weights"] = layer.weights.grad
            layer.weights.grad = None
    return worst_of([compare(found[f"mole, {how}"], found[f"loop, {how}"]) for how in ("by token", "one weight")])


def _step(layer: _Layer, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    return lambda: layer.step(x, gradient)


def _kept(layer: _Layer, x: Tensor, given: list[Tensor]) -> float:
    return kept_megabytes(lambda: layer.forward(x, layer.weights), [*given, layer.weights])
