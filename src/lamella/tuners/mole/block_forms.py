"""The forms that mix the outputs of whole blocks, each run with one LoRA: what the paper writes down, for study.

``block-delta``: ``O = F(x) + sum_i G_i (E_i(x) - F(x))``; ``published``: ``O = F(x) + sum_i G_i E_i(x)`` (MOLE eq. 13),
which adds the input that every block passes on a second time. F is the block alone, E_i the block with LoRA i.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamella.backbones import BlockCall, hidden_states_of, with_hidden_states
from lamella.errors import LamellaError
from lamella.routing import Frame, current_frame, in_frame
from lamella.tuners.cache import refuse_foreign
from lamella.tuners.mole.config import MoleConfig
from lamella.tuners.mole.group import Group, Member
from lamella.tuners.mole.plan import GroupPlan
from lamella.tuners.mole.router import BlockOutputs


class BlockGroup(Group):
    """A group whose decision is for the outputs of its block; inside, one LoRA runs at a time, or none.

    Attributes:
        features: of those outputs.
    """

    def __init__(
        self, plan: GroupPlan, adapter: str, config: MoleConfig, names: Sequence[str], decoder: bool, features: int
    ) -> None:
        super().__init__(plan, adapter, config, names, decoder)
        self.features = features

    @property
    def goes_with_sequences(self) -> bool:
        """Each LoRA by itself would need keys of its own."""
        return self.decoder and self.input == "own"

    def mixing_weights(self, layer: Member, x: Tensor, frame: Frame | None) -> tuple[Tensor | None, Tensor | None]:
        """All weight on the LoRA that runs alone; None where the block runs by itself."""
        alone = None if frame is None else frame.alone
        if alone is None or alone[0] != self.key:
            return None, None
        places = torch.arange(len(self.names), device=x.device)
        return (places == alone[1]).float(), None

    def mix(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the block returns, with the LoRAs' outputs mixed into its own."""
        frame, call = current_frame(), BlockCall(block, args, kwargs)
        if frame is None:
            raise LamellaError(f"{self.name} runs outside a forward of its model; call the model itself.")
        self._refuse_cache(call, frame)
        unadapted = hidden_states_of(output)
        # Without a cache: the keys there are the block's own.
        alone_args, alone_kwargs = call.on(None, None, output)
        each = []
        for index in range(len(self.names)):
            with in_frame(frame.again(alone=(self.key, index))):
                each.append(hidden_states_of(block.forward(*alone_args, **alone_kwargs)))
        weights = self._weights_for(each, call.hidden_states, frame)
        weights = weights.view(*weights.shape[:-1], *[1] * (unadapted.dim() - weights.dim()), -1).to(unadapted.dtype)
        mixed = unadapted
        for index, one in enumerate(each):
            part = one - unadapted if self.config.form == "block-delta" else one
            mixed = mixed + weights[..., index, None] * part
        return with_hidden_states(output, mixed)

    def _weights_for(self, each: list[Tensor], x: Tensor, frame: Frame) -> Tensor:
        """``(K,)``, ``(batch, K)`` or ``(batch, tokens, K)``."""
        override = self.override(frame)
        if override.fixed is not None:
            fixed = override.fixed_weights(x.device)
            self.show_fixed(fixed, x, frame)
            return fixed if fixed.dim() == 1 else self.repeated(fixed, self.owner, x)
        decision = self.decide(self.owner, x, BlockOutputs(self.router, each), frame, override)
        return self.fit(decision, self.owner, x)

    def _refuse_cache(self, call: BlockCall, frame: Frame) -> None:
        refuse_foreign(frame.call, self.name)
        if call.cache is not None and (frame.call.generation is not None or frame.call.past > 0):
            raise LamellaError(
                f"form={self.config.form!r} runs {self.name} with each LoRA by itself, and each would need keys of its "
                "own, which the cache does not hold. Use use_cache=False, or form='delta'."
            )


class BlockMixture:
    """The hook by which a group mixes at its block."""

    def __init__(self, group: BlockGroup) -> None:
        self.group = group

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the block returns instead."""
        return self.group.mix(block, args, kwargs, output) if self.group.owner.runs(self.group) else output


def mix_at_block(block: nn.Module, group: BlockGroup) -> None:
    """Lets a group mix at its block."""
    block.register_forward_hook(BlockMixture(group), with_kwargs=True)


def remove_mixtures(model: nn.Module, adapter: str | None = None) -> None:
    """Takes the hooks of one adapter, or of all, off a model's blocks."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, BlockMixture) and adapter in (None, hook.group.adapter):
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
