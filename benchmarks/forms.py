"""One linear layer with E experts in its dense and its sorted form, to find where the faster one changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from pydantic import Field
from torch import Tensor, nn

from benchmarks.equality import Equality, compare
from benchmarks.measure import Timed, measure_case
from benchmarks.record import Benchmark, BenchSettings, Case, Record, Say, Target
from lamella.kernels import mix_dense, mix_sorted, project
from lamella.lab.methods import trainable_parameters
from lamella.lab.studies.measuring import kept_megabytes
from lamella.routing import LinearRouter

_SCALING = 2.0
_PAIRS = (("dense", "frozen"), ("sorted", "frozen"), ("lora", "frozen"), ("sorted", "dense"), ("dense", "lora"))


class FormsSettings(BenchSettings):
    """A layer of every width with every number of experts of rank r."""

    tokens: int = Field(2048, ge=1)
    widths: tuple[int, ...] = (768, 2048)
    num_experts: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    r: int = Field(8, ge=1)
    top_k: Literal[2] = 2


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


def run(settings: FormsSettings, say: Say) -> list[Case]:
    """Times forward and backward of each form for every width and number of experts, equality first.

    Raises:
        LamellaError: the forms differ in float64.
    """
    cases = []
    for width in settings.widths:
        for num_experts in settings.num_experts:
            say(f"d={width}, E={num_experts}")
            cases.append(_case(settings, width, num_experts))
    return cases


def _case(settings: FormsSettings, width: int, num_experts: int) -> Case:
    x = torch.randn(settings.tokens, width, requires_grad=True)
    base = nn.Linear(width, width).requires_grad_(False)
    dense, by_token = (Mixed(base, num_experts, settings.r, settings.top_k, form) for form in ("dense", "sorted"))
    by_token.load_state_dict(dense.state_dict())
    rank = num_experts * settings.r
    lora = get_peft_model(nn.Sequential(base), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"]))
    equality = _check_equality(dense, by_token, x)
    x = x.detach().to(settings.device, settings.torch_dtype).requires_grad_()
    gradient = torch.randn_like(x)
    modules = {
        "frozen": (base, "the frozen layer, gradient to its input"),
        "dense": (dense, "lamella's dense form"),
        "sorted": (by_token, "lamella's sorted form"),
        "lora": (lora, f"PEFT LoRA of rank {rank}"),
    }
    methods = {}
    for name, (module, what) in modules.items():
        module.to(settings.device, settings.torch_dtype)
        step = _step(module, x, gradient)
        methods[name] = Timed(what, step, trainable_parameters(module), partial(_kept, module, x))
    return measure_case(f"d={width}, E={num_experts}", methods, _PAIRS, equality, settings)


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


def targets(record: Record) -> Sequence[Target]:
    """None: where the faster form changes is a finding."""
    return ()


def shape(settings: dict[str, Any]) -> str:
    """What was measured, in words."""
    return f"r={settings['r']}, top-{settings['top_k']}, {settings['tokens']:,} tokens, none of them padding"


_QUICK = {"rounds": 2, "tokens": 32, "widths": (16,), "num_experts": (2, 4)}
FORMS = Benchmark(FormsSettings, _QUICK, run, targets, shape, by_case="d=")
