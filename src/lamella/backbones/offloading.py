"""Weights that accelerate or FSDP2 keeps elsewhere.

accelerate brings a module's weights in when that module's forward runs, and takes them out again; until then they are
on the meta device, without numbers. What reads the tensors of a module that it does not call brings them in with
`onloaded`.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def onloaded(*modules: nn.Module) -> AbstractContextManager[object]:
    """Brings in the weights of modules that accelerate has offloaded, for what reads them without calling them."""
    offloaded = [module for module in modules if is_offloaded(module)]
    return _aligned(offloaded) if offloaded else nullcontext()


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of this very module, none of those inside it, are kept elsewhere now."""
    return "_hf_hook" in module.__dict__ and any(
        tensor is not None and tensor.is_meta for tensor in (*module._parameters.values(), *module._buffers.values())
    )


@contextmanager
def _aligned(modules: Sequence[nn.Module]) -> Iterator[None]:
    with ExitStack() as loaded:
        for module in modules:
            loaded.enter_context(align_module_device(module))
        yield


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module whose weights it keeps elsewhere; None for any other module."""
    return torch.device(module.__dict__["_hf_hook"].execution_device) if has_offloaded_params(module) else None


def is_sharded(weight: Tensor) -> bool:
    """Whether parts of a weight are in other processes now; FSDP2 gathers them while their module's forward runs."""
    return isinstance(weight, DTensor)


def input_device(model: nn.Module) -> torch.device:
    """Where a model's inputs belong: where its first weights are, or are brought to when they are needed."""
    first = next(module for module in model.modules() if any(True for _ in module.parameters(recurse=False)))
    return execution_device(first) or next(model.parameters()).device
