"""Before a run: the effects that it relies on are there, and what it will cost. On its first step: they still are."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lamella.diagnostics.equivalence import examine_cache, examine_padding, examine_roundtrip
from lamella.diagnostics.running import device_of, loss_of, preserve_state, to_device
from lamella.diagnostics.training_step import examine_effects, examine_method
from lamella.diagnostics.weights import describe_skipped, examine_numbers, examine_targets, tensors_of
from lamella.errors import LamellaError
from lamella.findings import Diagnosis, Examination
from lamella.tuners.routed import routed_layers

_TIMED_STEPS = 3
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Estimate:
    """What a run will cost, from a few of its steps.

    Attributes:
        seconds_per_step: median over the steps timed, each forward, backward and AdamW on one batch.
        steps: such steps in the whole run.
        peak_bytes: of the GPU's allocations where there is one, else of the process's resident memory.
    """

    seconds_per_step: float
    steps: int
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """Time of all steps, without loading, scoring and saving."""
        return self.seconds_per_step * self.steps

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        return (
            f"{self.steps:,} steps of {self.seconds_per_step:.2g} s: {minutes // 60} h {minutes % 60:02d} min "
            f"{seconds:02d} s without scoring and saving; peak memory {self.peak_bytes / 1e6:,.0f} MB"
        )


@dataclass(frozen=True)
class Preflight(Diagnosis):
    """A diagnosis with the estimate of the run; no estimate where a training step is not possible."""

    estimate: Estimate | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: ok, findings, checked, estimate."""
        cost = None if self.estimate is None else {**vars(self.estimate), "seconds": self.estimate.seconds}
        return {**super().as_dict(), "estimate": cost}

    def __str__(self) -> str:
        return super().__str__() + (f"\nestimate: {self.estimate}" if self.estimate else "")


def preflight(model: nn.Module, batch: Mapping[str, Any], steps: int = 1, *, bf16: bool = False) -> Preflight:
    """Asserts the effects that a run relies on, and estimates its cost.

    Examined are the numbers and targets, the balance loss where its coefficient is above 0, a gradient at every router,
    that what is saved loads equal, that padding changes nothing, and that a decoder generates the same with and
    without its cache. Afterwards weights, gradients, buffers, training modes and random states are bit for bit
    what they were.

    Args:
        model: ready to train.
        batch: one of its training batches.
        steps: forward and backward passes of the whole run, for the estimate.
        bf16: whether the run computes in bfloat16 by autocast, for the estimate; effects are compared without.
    """
    examination = Examination()
    examine_numbers(tensors_of(model), type(model).__name__, examination)
    for adapter, config in getattr(model, "peft_config", {}).items():
        examine_targets(model, config, adapter, examination)
    describe_skipped(model, examination)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        examination.error(
            "nothing-to-train",
            "no parameter is trained: requires_grad is off everywhere",
            type(model).__name__,
            "there is nothing for a run to do",
            "choose a method or settings that train something",
        )
    if examination.findings:
        examination.saw("everything else: not examined before these are mended")
        return _result(examination, None)
    with preserve_state(model):
        examine_effects(model, batch, examination)
        if any(finding.severity == "error" for finding in examination.findings):
            examination.saw("saving, padding, cache and cost: not examined before these are mended")
            return _result(examination, None)
        examine_method(model, batch, examination)
        examine_roundtrip(model, batch, examination)
        examine_padding(model, batch, examination)
        examine_cache(model, batch, examination)
        estimate = _estimate(model, to_device(batch, device_of(model)), steps, bf16)
    return _result(examination, estimate)


class FirstStep(TrainerCallback):
    """Looks at the very first optimizer step of a run: every router has a gradient, and the optimizer will move it."""

    def __init__(self) -> None:
        self._done = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks once.

        Raises:
            LamellaError: a router is cut off, is not in the optimizer, or no balance loss arrived.
        """
        if not self._done:
            self._done = True
            check_first_step(kwargs["model"], kwargs["optimizer"])


def check_first_step(model: nn.Module, optimizer: Any) -> None:
    """Asserts, after a backward pass and before the optimizer steps, that routers learn.

    A single gradient of exactly zero is not a fault: with B zero a router has the balance loss alone, and that is flat
    where the batch is balanced perfectly. At all routers at once it is one.

    Raises:
        LamellaError: a router is cut off, is not in the optimizer, or no balance loss arrived.
    """
    layers = [layer for layer in routed_layers(model) if layer.learns]
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in layers:
        parameters = list(layer.router.parameters())
        if not any(id(parameter) in moved for parameter in parameters):
            raise LamellaError(
                f"The router of {layer.name} is not in the optimizer, so it would keep its random choices. Make the "
                "optimizer after the adapter, from lamella.param_groups(model, lr) or all parameters that require grad."
            )
        if all(parameter.grad is None for parameter in parameters):
            raise LamellaError(
                f"The router of {layer.name} got no gradient in the first step: it is cut off from the loss. Run "
                "lamella.doctor(model) to see why."
            )
    owing = [layer for layer in layers if layer.loss and layer.top_k < layer.num_experts]
    if owing and not any(bool(p.grad.ne(0).any()) for o in owing for p in o.router.parameters() if p.grad is not None):
        raise LamellaError(
            f"No balance loss arrived in the first step, though {len(owing)} routers have a coefficient above 0: all "
            "their gradients are zero. Run lamella.doctor(model) to see why."
        )


def _result(examination: Examination, estimate: Estimate | None) -> Preflight:
    diagnosis = examination.diagnosis()
    return Preflight(diagnosis.findings, diagnosis.checked, estimate)


def _estimate(model: nn.Module, batch: dict[str, Any], steps: int, bf16: bool) -> Estimate:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seconds = []
    with _restored(trained) as kept_bytes:
        optimizer = torch.optim.AdamW(trained, lr=1e-6)
        model.train()
        reset_peak_memory()
        for _ in range(1 + _TIMED_STEPS):  # the first one warms up
            started = _now()
            with torch.autocast(device_of(model).type, torch.bfloat16, enabled=bf16):
                loss = loss_of(model(**batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(_now() - started)
        peak = peak_memory() - kept_bytes
    return Estimate(sorted(seconds[1:])[_TIMED_STEPS // 2], steps, peak)


@contextmanager
def _restored(parameters: list[nn.Parameter]) -> Iterator[int]:
    """The parameters may be changed inside; gives the bytes that their copies take."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield sum(tensor.nbytes for tensor in before)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak_memory() -> None:
    """Forget earlier peaks of this process, where the system can (Linux, CUDA), so that runs in one process compare."""
    if _CLEAR.exists():
        _CLEAR.write_text("5", encoding="ascii")  # 5 resets VmHWM, the high-water mark of resident memory
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Peak in bytes: of the GPU's allocations where there is one, else of this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
