"""What is said of a model that has no experts, or none that lamella knows."""

import re

from torch import nn
from torch.nn.modules.conv import _ConvNd

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NAMES = re.compile(r"experts?$|router|(^|_)gate$|moe|sparse", re.IGNORECASE)
_MOST_LINES = 12
_REFUSED = {
    "DogeCDMoE": "its experts are single rows of embeddings, looked up by product keys, without matrices of their own",
    "JetMoeMoE": "no module holds its experts, which lie beside each other in two, and in its attention too",
    "Mxfp4GptOssExperts": "its experts are packed in 4 bits; load it with Mxfp4Config(dequantize=True)",
    "NllbMoeExperts": "transformers takes its router's mask for indices, so that only experts 0 and 1 ever run",
    "VitPoseBackboneMoeMLP": "its experts are chosen by the data set that a whole picture is from, not by a router",
}


def explain_unknown(model: nn.Module) -> str:
    """Why ``moe_layers`` finds nothing in a model, and what to do."""
    kinds = {type(module).__name__ for module in model.modules()}
    if why := next((why for kind, why in _REFUSED.items() if kind in kinds), None):
        return f"{type(model).__name__} is a mixture of experts that lamella does not read: {why}."
    report = structure(model)
    config = getattr(model, "config", None)
    if not report and not any((getattr(config, name, None) or 0) > 1 for name in _COUNTS):
        return (
            f"{type(model).__name__} is not a mixture of experts: nothing in it looks like a router or like experts. "
            "Give a mixture of experts (Mixtral, Qwen-MoE, DeepSeek, GPT-OSS, ...) or a model with a MoLA adapter."
        )
    family = getattr(config, "model_type", None) or "family"
    return (
        f"{type(model).__name__} seems to be a mixture of experts that does not follow transformers' contract "
        "(use_experts_implementation), of a family that lamella does not know. To teach it, "
        f"write src/lamella/backbones/moe/{family}.py: a subclass of MoEFamily that names the class of the module that "
        "holds router and experts and says how an expert is read (dbrx.py is the shortest), and import it in "
        f"src/lamella/backbones/moe/__init__.py. What looks like it in one block or more: {'; '.join(report)}."
    )


def structure(model: nn.Module) -> list[str]:
    """A line per kind of module that looks like a router or like experts: class, parameter shapes, holder, place."""
    kinds: dict[str, tuple[str, int]] = {}
    for name, module in model.named_modules():
        if "lamella_" in name or not _looks_like_it(name.rpartition(".")[2], module):
            continue
        shapes = ", ".join(f"{key} {tuple(one.shape)}" for key, one in module.named_parameters(recurse=False))
        holder = type(model.get_submodule(name.rpartition(".")[0])).__name__
        kind = f"{type(module).__name__} ({shapes or 'no parameters of its own'}) in {holder}"
        first, count = kinds.get(kind, (name, 0))
        kinds[kind] = (first, count + 1)
    lines = [f"{count} x {kind}, the first at {first}" for kind, (first, count) in kinds.items()]
    return lines[:_MOST_LINES]


def _looks_like_it(name: str, module: nn.Module) -> bool:
    """Parameters with a row of matrices, or a name that says so; a stack of convolutions has such parameters too."""
    if isinstance(module, _ConvNd):
        return False
    stacked = any(one.dim() == 3 and one.shape[0] > 1 for one in module.parameters(recurse=False))
    return stacked or bool(_NAMES.search(name))
