"""What tells one model or tokenizer from another, at the cost of reading a sample of it."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 256  # values of each tensor, and of each expert in a tensor that holds several
# what a config says about a file or a call, not about the function that the model is
_ASIDE = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"}


def model_fingerprint(model: nn.Module) -> str:
    """Class of a model and a hash of its config and of sampled values of every parameter and saved buffer.

    A tensor of three dimensions is sampled in each index of the first, so that any expert counts. The values are
    hashed as float32: a bfloat16 model that is loaded as float32 is the same model. A change of a few single values may
    go unnoticed.
    """
    stated: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    digest = hashlib.sha256(_json({k: v for k, v in stated.items() if k not in _ASIDE}))
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(_sampled(tensor).numpy().tobytes())
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Class of a tokenizer and a hash of all that decides the ids of a text, padding and truncation aside."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        stated = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}
    else:
        stated = json.loads(backend.to_str())
        stated = {name: part for name, part in stated.items() if name not in ("padding", "truncation")}
    return f"{type(tokenizer).__name__} {hashlib.sha256(_json(stated)).hexdigest()[:16]}"


def _json(stated: Any) -> bytes:
    return json.dumps(stated, sort_keys=True, default=str).encode()


def _sampled(tensor: Tensor) -> Tensor:
    parts = tensor.flatten(1) if tensor.dim() == 3 else tensor.reshape(1, -1)
    # an odd step, so that it does not visit the same few columns of every row
    step = (parts.shape[1] // _SAMPLED) | 1
    return parts[:, ::step].to("cpu", torch.float32).contiguous()
