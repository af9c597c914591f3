"""Strict loading: an adapter's tensors match the model one to one and are numbers, or nothing is loaded."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lamella.errors import LamellaError

_PEFT = "base_model.model."
_LARGEST = 1e12  # no training gets there, and the squares of their products are still finite in float32


def check_tensors(model: nn.Module, prefixes: Sequence[str], adapter: str, tensors: dict[str, Tensor]) -> None:
    """Compares the tensors of an adapter file with the adapter's parameters in the model.

    Args:
        model: the model with the adapter injected.
        prefixes: what the names of the method's parameters start with.
        adapter: the adapter's name.
        tensors: the file's tensors under the model's names.

    Raises:
        LamellaError: a tensor is missing, has no place, has another shape, is of another kind of numbers than the
            model's, or is not finite.
    """
    state = {name.removeprefix(_PEFT): p for name, p in model.state_dict().items()}
    # Parameters, and what else is saved, such as LoRAs that are embedded in the file.
    own = {name for name in state if any(_adapter_of(name, prefix) == adapter for prefix in prefixes)}
    places = own | {name for name in state if f"modules_to_save.{adapter}." in name or ".token_adapter." in name}
    places |= {name.removeprefix(_PEFT) for name in _embeddings(model)}  # PEFT saves those of a grown vocabulary
    theirs = {name.removeprefix(_PEFT): t for name, t in tensors.items()}
    both = sorted(places & set(theirs))
    missing, extra = sorted(own - set(theirs)), sorted(set(theirs) - places)
    unlike = [
        f"{name} is {shape_of(theirs[name])} in the file and {shape_of(state[name])} in the model"
        for name in both
        if shape_of(theirs[name]) != shape_of(state[name])
    ]
    if missing or extra or unlike:
        faults = [
            *(f"{len(missing)} missing, first {missing[0]}" for _ in missing[:1]),
            *(f"{len(extra)} without a place in the model, first {extra[0]}" for _ in extra[:1]),
            *(f"{len(unlike)} of another shape, first {unlike[0]}" for _ in unlike[:1]),
        ]
        raise LamellaError(
            f"The adapter's tensors do not fit this model: {'; '.join(faults)}. It was saved for another base model, "
            "other target modules or another number of experts; load it on the base named in its adapter_config.json "
            "and leave that file unchanged."
        )
    for name in both:
        if theirs[name].is_floating_point() != state[name].is_floating_point():
            raise LamellaError(
                f"The adapter's tensor {name} holds {theirs[name].dtype} where the model has {state[name].dtype}: its "
                "numbers were rounded when the file was written. Restore the file from a copy, or save it again."
            )
        if not _usable(theirs[name]):
            raise LamellaError(
                f"The adapter's tensor {name} holds NaN or infinity, or more than {_LARGEST:g}, and so would every "
                "output that depends on it. Restore the file from a copy, or train again from the last good checkpoint."
            )


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Its shape; a tensor without dimensions, as a learned temperature of MOLE once was, is one of one number."""
    return tuple(tensor.shape) or (1,)


def _usable(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # torch compares no 8-bit floats
    return bool((wide.abs() <= _LARGEST).all())  # false of NaN


def _embeddings(model: nn.Module) -> Iterator[str]:
    """Names of the parameters of the model's input and output embeddings."""
    embeddings = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embeddings.append(getattr(model, ask)())
        except (AttributeError, NotImplementedError):  # a model without tokens
            continue
    for name, module in model.named_modules():
        if any(module is one for one in embeddings):
            yield from (f"{name}.{inside}" for inside in module.state_dict())


def _adapter_of(name: str, prefix: str) -> str | None:
    """``default`` for ``...query.lamella_mola_router.default.weight``; None for a parameter of another kind."""
    _, separator, rest = name.partition(f".{prefix}")
    parts = rest.split(".")
    return parts[1] if separator and len(parts) > 1 else None
