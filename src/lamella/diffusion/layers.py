"""What composing needs in a pipeline: decisions for whole samples of any shape, and 1x1 convolutions as linear maps."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from lamella.errors import LamellaError
from lamella.routing import Frame, Readable, Rows
from lamella.tuners.mole.group import Group, Member
from lamella.tuners.mole.layer import MoleLinear, MoleProjection


class SampleGroup(Group):
    """A group of a model that makes images: each row of a batch is a sample of any shape and decides for itself.

    All of a sample is read, padding of a prompt apart where a mask tells it: nothing in it is said before the rest.
    """

    def as_sequences(self, layer: Member, x: Tensor, frame: Frame | None) -> Tensor:
        """``(batch, tokens, in)`` of an image's or a prompt's tokens, or of one vector per sample."""
        return x[:, None] if x.dim() == 2 else x.flatten(1, -2)

    def readable(self, tokens: Tensor, layer: Member, frame: Frame | None) -> Readable:
        mask = None if frame is None else frame.mask
        if mask is not None and mask.shape == tokens.shape[:2]:
            return Readable(mask.to(tokens.device), None, Rows(len(tokens)))
        everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Readable(everything, None, Rows(len(tokens)))

    def repeated(self, weights: Tensor, layer: Member, x: Tensor) -> Tensor:
        """Classifier-free guidance runs all samples twice, one whole batch after the other."""
        if len(x) not in (len(weights), 2 * len(weights)):
            raise LamellaError(
                f"There are weights for {len(weights)} images, and {layer.name} is given {len(x)} rows; give one set of"
                " weights per image, with num_images_per_prompt=1."
            )
        return weights if len(x) == len(weights) else weights.repeat(2, 1)


class _InPipeline:
    """Refuses what diffusers does with LoRAs of its own."""

    def scale_layer(self, scale: float) -> None:
        """Diffusers calls it for a scale in the pipeline's arguments."""
        raise LamellaError(
            f"A composition takes no scale from the pipeline (here {scale}). Give all weights inside "
            "`with composition.fixed_weights({...})`, without cross_attention_kwargs."
        )

    def set_scale(self, adapter: str, scale: float) -> None:
        """Diffusers calls it in ``set_adapters``."""
        raise LamellaError(
            f"set_adapters is for LoRAs that diffusers holds (here {adapter!r}). Give weights inside "
            "`with composition.fixed_weights({...})`, or call composition.unload() first."
        )


class PipelineLinear(_InPipeline, MoleLinear):
    """A linear module with the LoRAs that are composed on it."""


class PipelineProjection(_InPipeline, MoleProjection):
    """A convolution or an embedding with the LoRAs that are composed on it."""


class Pointwise(nn.Module):
    """A 1x1 convolution as a linear map of the channels: ``(batch, H, W, in)`` to ``(batch, H, W, out)``."""

    def __init__(self, base_layer: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        """Runs the convolution itself, so that without LoRAs nothing changes."""
        y: Tensor = self.base_layer(x.movedim(-1, 1))
        return y.movedim(1, -1)


class PipelineConv(PipelineLinear):
    """A 1x1 convolution with the LoRAs that are composed on it."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x (batch, in, H, W)`` to ``(batch, out, H, W)``."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def is_pointwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a 1x1 convolution and nothing but a linear map of the channels."""
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)
        and not any(module.padding)
    )
