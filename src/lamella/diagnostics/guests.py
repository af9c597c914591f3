"""Whether MoLEx's guests steer a block or overwhelm it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lamella.backbones import hidden_states_of
from lamella.diagnostics.finding import Examination
from lamella.diagnostics.parts import device_of, loss_of, to_device
from lamella.diagnostics.undisturbed import undisturbed
from lamella.tuners.molex.block import MolexBlock

# how far a guest may move the hidden states, over how far the block itself moves them
OVERWHELMING = 1.0
# how much larger than the base model's the loss of the first step may be
HARMED = 0.25


def examine_guests(model: nn.Module, batch: Mapping[str, Any], examination: Examination) -> None:
    """Runs a batch without dropout and compares what guests add with what their hosts do; the model is left as it was.

    Before training the LoRAs inside do nothing yet, so that any loss above the base model's is the guests' doing.
    """
    hosts = [module for module in model.modules() if isinstance(module, MolexBlock)]
    if not hosts:
        return
    batch = to_device(batch, device_of(model))
    with undisturbed(model), torch.no_grad():
        model.eval()
        shares = _Shares(hosts)
        with shares:
            loss = float(loss_of(model(**batch)))
        if found := {name: share for name, share in shares.found.items() if share > OVERWHELMING}:
            examination.warning(
                "guest-overwhelms",
                f"at {len(found)} block(s) the guest moves the hidden states farther than the block itself",
                [f"{name} ({share:.2f} of the block's own step)" for name, share in found.items()],
                "the pretrained computation is drowned before training starts, and LoRA has to repair it",
                "raise alpha (0.95 is published), or name candidates that are near in depth",
            )
        if isinstance(model, PeftModel) and _untrained(model):
            with model.disable_adapter():
                base = float(loss_of(model(**batch)))
            if loss > base * (1 + HARMED):
                examination.warning(
                    "guests-harm",
                    f"before training the loss is {loss:.3f} with guests and {base:.3f} without",
                    type(model).__name__,
                    "the model starts from a worse place than plain LoRA does",
                    "raise alpha, or name candidates that are near in depth",
                )
            examination.saw(f"loss before training: {loss:.3f} with guests, {base:.3f} without")
    if shares.found:
        examination.saw(
            f"guests at {len(shares.found)} blocks: they move the hidden states by {min(shares.found.values()):.2f} to "
            f"{max(shares.found.values()):.2f} of the block's own step"
        )


def _untrained(model: nn.Module) -> bool:
    return not any(bool(p.detach().any()) for name, p in model.named_parameters() if ".lora_B." in name)


class _Shares:
    """Watches blocks run: `found` has, by name, the norm of what guests added over the norm of the block's own step."""

    def __init__(self, hosts: list[MolexBlock]) -> None:
        self._hosts = hosts
        self._hooks: list[Any] = []
        self._own: dict[MolexBlock, Tensor | None] = {}
        self.found: dict[str, float] = {}

    def __enter__(self) -> None:
        for host in self._hosts:
            self._hooks += [
                host.register_forward_pre_hook(lambda module, _: self._own.__setitem__(module, None)),
                host.base_layer.register_forward_hook(lambda _, args, output, host=host: self._keep(host, output)),
                host.register_forward_hook(self._compare, with_kwargs=True),
            ]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, host: MolexBlock, output: Any) -> None:
        # a block runs for itself first, and then perhaps as the guest of others
        if host in self._own and self._own[host] is None:
            self._own[host] = hidden_states_of(output)

    def _compare(self, host: MolexBlock, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        own = self._own.pop(host)
        mixed = hidden_states_of(output)
        given = args[0] if args else kwargs["hidden_states"]
        if own is not None and not torch.equal(own, mixed):
            added, step = (mixed - own).float().norm(), (own - given).float().norm()
            self.found[host.name] = float(added / step.clamp_min(1e-12))
