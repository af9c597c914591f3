"""What a training step does: the balance loss is there, and a gradient arrives at every router."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lamella.diagnostics.running import (
    device_of,
    loss_of,
    preserve_state,
    random_batch,
    to_device,
    transformer,
    without_checkpointing,
)
from lamella.errors import LamellaError
from lamella.findings import Examination
from lamella.routing import collect_losses, find_tracker, loss_scale
from lamella.tuners.model import RoutedModel
from lamella.tuners.routed import AttachedLoss, RoutedLayer, routed_layers

_TRIES = 4
_NUDGE = 0.02  # standard deviation given to a B that is zero, about that of a transformer's weights


def examine_effects(model: nn.Module, batch: Mapping[str, Any] | None, examination: Examination) -> None:
    """Runs forward and backward in training mode and looks at each router and all else that adapters train.

    Where B is zero, as at the start, the task loss does not depend on the routers yet: then the balance loss must give
    the gradient, and a router without one (k = N, or coefficients of 0) must get it as soon as B has moved, which is
    tried. The model is left as it was.

    Args:
        model: with its adapter.
        batch: arguments of its forward; None where none could be made up.
        examination: takes the findings.
    """
    before = len(examination.findings)
    layers, parts = routed_layers(model), _trained_parts(model)
    if not layers:
        examination.saw("routers: this model has none, so there is no gradient or balance loss to look at")
    elif find_tracker(model) is None:
        examination.error(
            "hooks-missing",
            "the hooks that tell the layers about a running forward are gone",
            type(transformer(model)).__name__,
            "without them the balance loss cannot be attached, and padding is routed and counted as text",
            "do not remove forward hooks from the model; apply the adapter anew with get_peft_model",
        )
        return
    layers = _trainable(model, layers, examination) if layers else []
    if not layers and not parts:
        return
    if batch is None:
        examination.saw("balance loss and gradients: not examined, the model takes no token ids; give batches")
        return
    batch = to_device(batch, device_of(model))
    try:
        with preserve_state(model):
            model.train()
            if layers:
                reached = _examine_balance(model, layers, batch, examination)
                _examine_gradients(model, reached, batch, examination)
            if len(examination.findings) == before:
                _examine_parts(model, parts, batch, examination)
    except LamellaError as error:
        examination.error(
            "training-step-fails",
            f"a forward and backward pass in training mode stops: {error}",
            type(model).__name__,
            "the model cannot be trained as it is",
            "follow the message",
        )


def examine_method(model: nn.Module, batch: Mapping[str, Any], examination: Examination) -> None:
    """Makes the checks that the adapter's method brings along; the model is left as it was."""
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, RoutedModel):
        batch = to_device(batch, device_of(model))
        with preserve_state(model), torch.no_grad():
            model.eval()
            tuner.examine(model, lambda: float(loss_of(model(**batch))), examination)


def _trainable(model: nn.Module, layers: list[RoutedLayer], examination: Examination) -> list[RoutedLayer]:
    """The layers that are meant to be trained and can be."""
    configs = getattr(model, "peft_config", {})
    for_inference = {adapter for adapter, config in configs.items() if config.inference_mode}
    if all(layer.adapter in for_inference for layer in layers):
        examination.saw(
            "balance loss and gradients: not examined, the adapter was loaded for inference (is_trainable=False)"
        )
        return []
    meant = [layer for layer in layers if layer.adapter not in for_inference and layer.learns]
    if fixed := len([layer for layer in layers if not layer.learns]):
        examination.saw(f"{fixed} router(s) are not meant to learn: the adapter's settings leave them no loss")
    frozen = [layer for layer in meant if not all(p.requires_grad for p in layer.router.parameters())]
    if frozen:
        _no_gradient(
            frozen,
            examination,
            "requires_grad is off",
            "call requires_grad_(True) on the routers, before the optimizer",
        )
    still = [layer.name for layer in meant if not all(p.requires_grad for p in layer.factors)]
    if still:
        examination.error(
            "expert-no-gradient",
            f"the experts of {len(still)} module(s) are frozen: requires_grad is off",
            still,
            "experts that are not trained add nothing, or stay what they were",
            "call requires_grad_(True) on the adapter's lora_A and lora_B, before the optimizer is made",
        )
    return [layer for layer in meant if layer not in frozen]


def _examine_balance(
    model: nn.Module, layers: list[RoutedLayer], batch: Mapping[str, Any], examination: Examination
) -> list[RoutedLayer]:
    """Collects the layers' own losses; returns the layers that this batch ran through."""
    ran: set[int] = set()
    hooks = [layer.module.register_forward_pre_hook(lambda module, _: ran.add(id(module))) for layer in layers]
    try:
        with without_checkpointing(model), collect_losses() as losses:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    reached = [layer for layer in layers if id(layer.module) in ran]
    if len(reached) < len(layers):
        examination.saw(f"{len(layers) - len(reached)} router(s) were not reached by this batch and not examined")
    owing = [(layer, layer.loss) for layer in reached if layer.loss is not None]
    missing = [layer.name for layer, loss in owing if not _arrived(losses.by_name, loss)]
    if missing:
        coefficients = sorted({loss.settings for _, loss in owing})
        examination.error(
            "balance-missing",
            f"{'; '.join(coefficients)}, but a forward in training mode gives no balance loss at {len(missing)} of "
            f"{len(owing)} routers",
            missing,
            "without it a router soon sends everything to the same experts, and the others are never trained",
            "apply the adapter anew with get_peft_model and leave its layers' settings as they are",
        )
    examination.saw(
        f"balance loss in training mode: {len(owing) - len(missing)} of {len(owing)} routers with a coefficient above 0"
    )
    return reached


def _arrived(losses: Sequence[tuple[str, Tensor]], expected: AttachedLoss) -> bool:
    values = [loss for name, loss in losses if name == expected.name]
    return any(value.requires_grad and (expected.may_be_zero or bool(value.detach() > 0)) for value in values)


def _examine_gradients(
    model: nn.Module, layers: list[RoutedLayer], batch: Mapping[str, Any], examination: Examination
) -> None:
    silent = _without_gradient(model, layers, batch)
    # a balance loss that is perfect on the batch given is flat there, and a block that chose itself has no gradient;
    # on all of these neither is likely
    for other in filter(None, (random_batch(model, seed) for seed in range(_TRIES))):
        if silent:
            silent = _without_gradient(model, silent, other)
    resting = [layer for layer in layers if layer.untrained]
    # what arrives at these is rounding
    silent += [layer for layer in resting if layer.loss and layer.loss.is_flat and layer not in silent]
    lost = silent
    if any(layer.untrained for layer in silent):
        with _nudged(resting):
            lost = _without_gradient(model, silent, batch)
    if lost:
        _no_gradient(
            lost,
            examination,
            "it is cut off from the loss",
            "look for a detach, a no_grad or an overridden forward between router and loss",
        )
    line = f"gradient in a training step: arrives at {len(layers) - len(lost)} of {len(layers)} routers"
    if resting:
        line += (
            f". The experts do nothing yet at {len(resting)}, so the task loss does not depend on their weights: "
            f"{sum(layer not in silent for layer in resting)} get it from the balance loss now, "
            f"{len(silent) - len(lost)} from the task loss once B has moved (tried)"
        )
    examination.saw(line)


def _without_gradient(model: nn.Module, layers: Sequence[RoutedLayer], batch: Mapping[str, Any]) -> list[RoutedLayer]:
    """The layers whose router gets nothing but zeros from a forward and backward pass."""
    model.zero_grad(set_to_none=True)
    with loss_scale(model, 1.0):  # of a batch without labels the loss is built here
        loss_of(model(**batch)).backward()
    return [layer for layer in layers if not any(_not_zero(parameter) for parameter in layer.router.parameters())]


def _not_zero(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.ne(0).any())


def _trained_parts(model: nn.Module) -> dict[nn.Module, tuple[str, list[nn.Parameter]]]:
    """The layers in which adapters train more than a router: their names, and what they train."""
    routers = {id(p) for layer in routed_layers(model) for p in layer.router.parameters()}
    parts = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            held = [getattr(module, own) for own in module.adapter_layer_names]
            trained = [p for one in held for p in one.parameters() if p.requires_grad and id(p) not in routers]
            if trained:
                parts[module] = name, trained
    return parts


def _examine_parts(
    model: nn.Module,
    parts: dict[nn.Module, tuple[str, list[nn.Parameter]]],
    batch: Mapping[str, Any],
    examination: Examination,
) -> None:
    """Looks at the gradient of the task loss alone: a balance loss moves routers also where nothing is made of them."""
    reached, silent = _run(model, parts, batch)
    for other in filter(None, (random_batch(model, seed) for seed in range(_TRIES))):
        if silent:
            silent &= _run(model, parts, other)[1]
    if silent:
        report = examination.error if silent == reached else examination.warning
        report(
            "adds-nothing",
            f"{len(silent)} of {len(reached)} modules with an adapter get no gradient from the task loss",
            [name for module, (name, _) in parts.items() if module in silent],
            "what they add is multiplied by zero, or nothing depends on it: they learn nothing, and change nothing",
            "correct the setting (lora_alpha, alpha_pattern, a dropout of 1), or leave those modules out",
        )
    examination.saw(
        f"effect: the task loss moves {len(reached) - len(silent)} of {len(reached)} modules with an adapter"
    )


def _run(
    model: nn.Module, parts: dict[nn.Module, tuple[str, list[nn.Parameter]]], batch: Mapping[str, Any]
) -> tuple[set[nn.Module], set[nn.Module]]:
    """The parts that a forward reaches with any input, and those of them that get no gradient from the task loss."""
    reached: set[nn.Module] = set()

    def see(module: nn.Module, given: tuple[Any, ...]) -> None:
        if all(x.numel() for x in given if isinstance(x, Tensor)):  # not an expert of a native MoE without tokens
            reached.add(module)

    hooks = [module.register_forward_pre_hook(see) for module in parts]
    model.zero_grad(set_to_none=True)
    try:
        with without_checkpointing(model), collect_losses():
            loss_of(model(**batch)).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return reached, {module for module in reached if not any(map(_not_zero, parts[module][1]))}


@contextmanager
def _nudged(layers: Sequence[RoutedLayer]) -> Iterator[None]:
    """B is not zero inside, as after the first step; afterwards it is again, bit for bit."""
    ups = [layer.factors[-1] for layer in layers]
    before = [up.detach().clone() for up in ups]
    try:
        with torch.no_grad():
            for up in ups:
                up.normal_(std=_NUDGE)
        yield
    finally:
        with torch.no_grad():
            for up, zero in zip(ups, before, strict=True):
                up.copy_(zero)


def _no_gradient(layers: Sequence[RoutedLayer], examination: Examination, cause: str, fix: str) -> None:
    examination.error(
        "router-no-gradient",
        f"{len(layers)} router(s) get no gradient: {cause}",
        [layer.name for layer in layers],
        "such a router keeps its random choices: the experts are a mixture in name only",
        fix,
    )
