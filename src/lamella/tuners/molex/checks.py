"""Whether MoLEx's guests steer a block or overwhelm it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lamella.backbones import hidden_states_of
from lamella.findings import Examination
from lamella.tuners.molex.block import MolexBlock

# how far a guest may move the hidden states, over how far the block itself moves them
OVERWHELMING = 1.0
# how much larger than the base model's the loss of the first step may be
HARMED = 0.25


def examine_guests(
    model: nn.Module, hosts: list[MolexBlock], run: Callable[[], float], examination: Examination
) -> None:
    """Compares what guests add with what their hosts do.

    Before training the LoRAs inside do nothing yet, so that any loss above the base model's is the guests' doing.

    Args:
        model: in evaluation mode.
        hosts: its blocks with guests.
        run: runs it on one batch without gradients and returns the loss.
        examination: takes the findings.
    """
    shares = _Shares(hosts)
    with shares:
        loss = run()
    if overwhelmed := {name: share for name, share in shares.by_name.items() if share > OVERWHELMING}:
        examination.warning(
            "guest-overwhelms",
            f"at {len(overwhelmed)} block(s) the guest moves the hidden states farther than the block itself",
            [f"{name} ({share:.2f} of the block's own step)" for name, share in overwhelmed.items()],
            "the pretrained computation is drowned before training starts, and LoRA has to repair it",
            "raise alpha (0.95 is published), or name candidates that are near in depth",
        )
    if isinstance(model, PeftModel) and _untrained(model):
        with model.disable_adapter():
            base = run()
        if loss > base * (1 + HARMED):
            examination.warning(
                "guests-harm",
                f"before training the loss is {loss:.3f} with guests and {base:.3f} without",
                type(model).__name__,
                "the model starts from a worse place than plain LoRA does",
                "raise alpha, or name candidates that are near in depth",
            )
        examination.saw(f"loss before training: {loss:.3f} with guests, {base:.3f} without")
    if shares.by_name:
        examination.saw(
            f"guests at {len(shares.by_name)} blocks: they move the hidden states by "
            f"{min(shares.by_name.values()):.2f} to {max(shares.by_name.values()):.2f} of the block's own step"
        )


def _untrained(model: nn.Module) -> bool:
    return not any(bool(p.detach().any()) for name, p in model.named_parameters() if ".lora_B." in name)


class _Shares:
    """Watches blocks run: `by_name` has the norm of what guests added over the norm of the block's own step."""

    def __init__(self, hosts: list[MolexBlock]) -> None:
        self._hosts = hosts
        self._hooks: list[Any] = []
        self._unmixed: dict[MolexBlock, Tensor | None] = {}
        self.by_name: dict[str, float] = {}

    def __enter__(self) -> None:
        for host in self._hosts:
            self._hooks += [
                host.register_forward_pre_hook(lambda module, _: self._unmixed.__setitem__(module, None)),
                host.base_layer.register_forward_hook(lambda _, args, output, host=host: self._keep(host, output)),
                host.register_forward_hook(self._compare, with_kwargs=True),
            ]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, host: MolexBlock, output: Any) -> None:
        # a block runs for itself first, and then perhaps as the guest of others
        if host in self._unmixed and self._unmixed[host] is None:
            self._unmixed[host] = hidden_states_of(output)

    def _compare(self, host: MolexBlock, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        unmixed = self._unmixed.pop(host)
        mixed = hidden_states_of(output)
        given = args[0] if args else kwargs["hidden_states"]
        if unmixed is not None and not torch.equal(unmixed, mixed):
            added, step = (mixed - unmixed).float().norm(), (unmixed - given).float().norm()
            self.by_name[host.name] = float(added / step.clamp_min(1e-12))
