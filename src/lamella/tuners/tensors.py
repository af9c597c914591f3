"""Single tensors of adapters: what they are called in a model."""

from typing import Any

from torch import Tensor, nn


class _Held(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}"


class AdapterTensors(nn.ModuleDict):
    """One tensor for each adapter, called ``<this>.<adapter>.weight`` in a model.

    So PEFT's LoRA calls its matrices: who copies an adapter by the names of parameters replaces ``.default.`` by
    ``.ref.``, and would overlook a name that ends in the adapter's. A file has no adapter's name, and calls the tensor
    ``<this>``.
    """

    def put(self, adapter: str, value: Tensor) -> None:
        """Sets an adapter's tensor."""
        self[adapter] = _Held(value)

    def of(self, adapter: str) -> nn.Parameter:
        """An adapter's tensor."""
        held = self[adapter]
        assert isinstance(held, _Held)
        return held.weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for adapter in self:  # the names of the first edition, in a whole model's state
            if f"{prefix}{adapter}" in state_dict:
                state_dict[f"{prefix}{adapter}.weight"] = state_dict.pop(f"{prefix}{adapter}")
        super()._load_from_state_dict(state_dict, prefix, *args)
