"""Strict loading: an adapter's tensors match the model one to one, or nothing is loaded."""

from torch import Tensor, nn

from lamella.errors import LamellaError

_PEFT = "base_model.model."


def check_tensors(model: nn.Module, prefix: str, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Compares the tensors of an adapter file with the adapter's parameters in the model.

    Args:
        model: the model with the adapter injected.
        prefix: what the names of the method's parameters start with.
        adapter: the adapter's name.
        tensors: the file's tensors under the model's names.

    Raises:
        LamellaError: a tensor is missing, is left over, or has another shape.
    """
    # Parameters, and what else is saved, such as LoRAs that are embedded in the file.
    expected = {
        name.removeprefix(_PEFT): p for name, p in model.state_dict().items() if _adapter_of(name, prefix) == adapter
    }
    theirs = {name.removeprefix(_PEFT): t for name, t in tensors.items() if f".{prefix}" in name}
    missing = sorted(set(expected) - set(theirs))
    extra = sorted(set(theirs) - set(expected))
    unlike = [
        f"{name} is {tuple(theirs[name].shape)} in the file and {tuple(p.shape)} in the model"
        for name, p in expected.items()
        if name in theirs and theirs[name].shape != p.shape
    ]
    if not (missing or extra or unlike):
        return
    faults = [
        *(f"{len(missing)} missing, first {missing[0]}" for _ in missing[:1]),
        *(f"{len(extra)} without a place in the model, first {extra[0]}" for _ in extra[:1]),
        *(f"{len(unlike)} of another shape, first {unlike[0]}" for _ in unlike[:1]),
    ]
    raise LamellaError(
        f"The adapter's tensors do not fit this model: {'; '.join(faults)}. It was saved for another base model, other "
        "target modules or another number of experts; load it on the base named in its adapter_config.json and leave "
        "that file unchanged."
    )


def _adapter_of(name: str, prefix: str) -> str | None:
    """``default`` for ``...query.lamella_mola_router.default.weight``; None for a parameter of another kind."""
    _, separator, rest = name.partition(f".{prefix}")
    parts = rest.split(".")
    return parts[1] if separator and len(parts) > 1 else None
