"""Fine-tuning of every parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lamella.lab.methods.base import Built, Method, method

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("full")
class Full(Method):
    """Every parameter is trained."""

    name: Literal["full"] = "full"

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The backbone itself, all of it trainable."""
        return Built(backbone.model.requires_grad_(True))
