"""Which modules of a model a LoRA can be composed on."""

from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D


def fan(module: nn.Module) -> tuple[int, int] | None:
    """The two sides of a module's weight as a matrix, ``(in, out)``; None where no LoRA of it can be composed.

    An embedding's input is its vocabulary, a convolution's its channels (of all groups) times its kernel.
    """
    if isinstance(module, nn.Embedding):
        return None if module.max_norm is not None else (module.num_embeddings, module.embedding_dim)
    if isinstance(module, _ConvNd):
        if isinstance(module, _ConvTransposeNd) or set(module.dilation) != {1} or module.padding_mode != "zeros":
            return None
        return module.in_channels * module.weight[0, 0].numel(), module.out_channels
    if isinstance(module, Conv1D) or hasattr(module, "in_features"):  # quantised layers have it too
        in_features, out_features = _get_in_out_features(module)
        # What else has in_features, such as a head around a linear module, is none.
        return None if in_features is None or out_features is None else (in_features, out_features)
    return None


def sides_of(module: nn.Module) -> tuple[int, int]:
    """The two sides of a module's weight as a matrix; ``(0, out)`` where only its bias can be composed."""
    sides = fan(module)
    if sides is None:
        bias = module.bias
        assert isinstance(bias, Tensor)
        return 0, bias.numel()
    return sides


def projects(module: nn.Module) -> bool:
    """Whether LoRAs are linear maps not of a module's input but of what they make of it first."""
    return isinstance(module, nn.Embedding | _ConvNd) or fan(module) is None


def adds_bias(module: nn.Module | None) -> bool:
    """Whether a module's bias is added to its output, so that another one adds its difference."""
    if module is None or not isinstance(getattr(module, "bias", None), Tensor):
        return False
    known = next((kind for kind in _ADD_THEIR_BIAS if isinstance(module, kind)), None)
    if known is not None:  # a class with a forward of its own may do otherwise
        return type(module).forward is known.forward
    return fan(module) is not None


_ADD_THEIR_BIAS = (
    nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d,
    nn.BatchNorm3d,
)  # fmt: skip
