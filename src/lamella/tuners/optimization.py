"""Which parameters learn how fast: adapters and routers apart, biases and norm weights without decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from lamella.errors import LamellaError
from lamella.tuners.routed import routed_layers


def param_groups(
    model: nn.Module,
    lr: float,
    router_lr: float | None = None,
    weight_decay: float = 0.0,
    router_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer or Trainer; every trainable parameter is in exactly one of them.

    Args:
        model: its parameters with ``requires_grad`` are grouped.
        lr: learning rate of everything but routers.
        router_lr: learning rate of the routers, 0 to leave them as they begin; ``lr`` if absent.
        weight_decay: of weight matrices outside routers; vectors (biases, norm weights) never decay.
        router_weight_decay: of router matrices.

    Returns:
        Non-empty groups, each with ``name`` (adapter, adapter-no-decay, router, router-no-decay), ``params``, ``lr``
        and ``weight_decay``.

    Raises:
        LamellaError: nothing is trainable, or ``router_lr`` is given for a model without a trainable router.
    """
    routers = {id(parameter) for layer in routed_layers(model) for parameter in layer.router.parameters()}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        routes, decays = id(parameter) in routers, parameter.ndim > 1
        name = ("router" if routes else "adapter") + ("" if decays else "-no-decay")
        rate = router_lr if routes and router_lr is not None else lr
        decay = (router_weight_decay if routes else weight_decay) if decays else 0.0
        group = groups.setdefault(name, {"name": name, "params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise LamellaError("Nothing in this model is trainable. Add an adapter, or set requires_grad on parameters.")
    if router_lr is not None and not any(name.startswith("router") for name in groups):
        raise LamellaError(
            f"router_lr={router_lr} was given, but this model has no trainable router. Leave router_lr out, "
            "or choose a routed method such as mola."
        )
    return list(groups.values())


def is_routed(model: nn.Module) -> bool:
    """Whether a router decides in the model."""
    return bool(routed_layers(model))
