"""One linear layer with E experts in its dense and its sorted form, to find where the faster one changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lamella.kernels import mix_dense, mix_sorted, project
from lamella.lab.bench.equality import Equality, compare
from lamella.lab.bench.results import Arm, BenchResult, Case
from lamella.lab.bench.settings import FormsSettings
from lamella.lab.methods import trainable_parameters
from lamella.lab.studies.measuring import clock_for, kept_megabytes, ratio, time_rounds, using_threads
from lamella.routing import LinearRouter

_SCALING = 2.0


class Mixed(nn.Module):
    """A frozen linear layer with a router and experts, in the form that is asked for.

    Args:
        base: the frozen layer.
        num_experts: E.
        r: rank of each expert.
        top_k: experts per token.
        form: "dense" or "sorted".
    """

    def __init__(self, base: nn.Linear, num_experts: int, r: int, top_k: int, form: str) -> None:
        super().__init__()
        self.base = base
        self.top_k = top_k
        self.form = form
        self.router = LinearRouter(base.in_features, num_experts)
        self.A = nn.Parameter(torch.randn(num_experts, r, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.randn(num_experts, base.out_features, r) / r**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x (N, in)`` to ``(N, out)``."""
        y = self.base(x)
        if self.form == "dense":
            h, product = project(x, [self.A.flatten(0, 1), self.router.weight])  # (N, E*r), (N, E)
            routing = self.router.route(self.router.logits(x, product), self.top_k)
            return mix_dense(y, h, routing.dense_weights(), self.B, _SCALING, in_place=True)
        routing = self.router(x, self.top_k)
        return mix_sorted(y, x, routing.weights, routing.indices, self.A, self.B, _SCALING)


def bench_forms(settings: FormsSettings, starting: Callable[[str], object] = lambda _: None) -> BenchResult:
    """Times forward and backward of each form for every width and number of experts, equality first.

    Args:
        settings: widths, numbers of experts, rounds, threads, precision and device.
        starting: told which layer begins.

    Raises:
        LamellaError: the forms differ in float64.
    """
    torch.manual_seed(0)
    cases = []
    with using_threads(settings.threads):
        for width in settings.widths:
            for num_experts in settings.num_experts:
                starting(f"d={width}, E={num_experts}")
                cases.append(_measure(settings, width, num_experts))
    clock = clock_for(settings.threads, settings.device)
    return BenchResult(bench="forms", settings=settings.model_dump(mode="json"), clock=clock, cases=cases)


def _measure(settings: FormsSettings, width: int, num_experts: int) -> Case:
    x = torch.randn(settings.tokens, width, requires_grad=True)
    arms, words = _arms(settings, width, num_experts)
    equality = _check_equality(arms["dense"], arms["sorted"], x)
    for arm in arms.values():
        arm.to(settings.device, settings.torch_dtype)
    x = x.detach().to(settings.device, settings.torch_dtype).requires_grad_()
    target = torch.randn_like(x)
    kept = {name: _kept(arm, x) for name, arm in arms.items()}
    steps = {name: _step(arm, x, target) for name, arm in arms.items()}
    seconds = time_rounds(steps, settings.rounds, clock_for(settings.threads, settings.device))
    measured = [
        Arm.of(name, words[name], seconds[name], trainable_parameters(arm), kept[name]) for name, arm in arms.items()
    ]
    pairs = (("dense", "frozen"), ("sorted", "frozen"), ("lora", "frozen"), ("sorted", "dense"), ("dense", "lora"))
    return Case(
        name=f"d={width}, E={num_experts}",
        arms=measured,
        equality=equality,
        ratios=[ratio(seconds, arm, over) for arm, over in pairs],
    )


def _arms(settings: FormsSettings, width: int, num_experts: int) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """All arms around one frozen layer; dense and sorted have the same weights."""
    base = nn.Linear(width, width).requires_grad_(False)
    dense = Mixed(base, num_experts, settings.r, settings.top_k, "dense")
    by_token = Mixed(base, num_experts, settings.r, settings.top_k, "sorted")
    by_token.load_state_dict(dense.state_dict())
    rank = num_experts * settings.r
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"])
    arms = {"frozen": base, "dense": dense, "sorted": by_token, "lora": get_peft_model(nn.Sequential(base), config)}
    words = {
        "frozen": "the frozen layer, gradient to its input",
        "dense": "lamella's dense form",
        "sorted": "lamella's sorted form",
        "lora": f"PEFT LoRA of rank {rank}",
    }
    return arms, words


def _check_equality(dense: nn.Module, by_token: nn.Module, x: Tensor) -> Equality:
    tensors = []
    for form in (dense, by_token):
        x64 = x.detach().double().requires_grad_()
        output = form.double()(x64)
        output.square().sum().backward()
        gradients = {name: p.grad for name, p in form.named_parameters() if p.grad is not None}
        tensors.append({"output": output.detach(), "gradient of x": x64.grad, **gradients})
        form.zero_grad(set_to_none=True)
    return compare(*tensors)


def _step(module: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    def step() -> None:
        module(x).backward(gradient)
        x.grad = None
        module.zero_grad(set_to_none=True)

    return step


def _kept(module: nn.Module, x: Tensor) -> float:
    return kept_megabytes(lambda: module(x), [*module.parameters(), *module.buffers(), x])
