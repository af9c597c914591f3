"""Classification heads and the names of their labels: a row of a head counts for the label that it was trained for."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

Head = Mapping[str, Tensor]
_NUMBER = re.compile(r"(LABEL_)?\d+")  # says which row, and not what it means


class Fitted(NamedTuple):
    """A LoRA's head for the labels of a model.

    Attributes:
        tensors: the head's, its rows in the order of the model's labels; None where it is not for the model.
        why_not: then the reason; else empty.
        assumed: whether its labels are taken as the model's, in the same order, because one of the two names none.
    """

    tensors: Head | None
    why_not: str = ""
    assumed: bool = False


def label_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's labels in the order of its outputs, by its config; empty where they have numbers alone."""
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    return _names(str(named[at]) for at in sorted(named, key=int))


def fit_head(model: nn.Module, place: str, tensors: Head, labels: Sequence[str] = ()) -> Fitted:
    """Fits what a LoRA was trained with whole to a model: by shape, and the rows of its labels by their names.

    Args:
        model: the base, whose config may name its labels (``id2label``).
        place: the module that stands in for one of the model's, by the model's name.
        tensors: of that module, by their names in it.
        labels: the names of the LoRA's labels, in the order of its head's rows; empty where they are not known.
    """
    own = dict(model.get_submodule(place).named_parameters())
    unfit = [name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape]
    count = getattr(getattr(model, "config", None), "num_labels", None)
    having = [name for name in own if own[name].shape[:1] == (count,) and name in tensors]
    last = having[-1].rpartition(".")[0] if having else ""  # the layer that answers, where a head has several
    rows = [name for name in having if name.rpartition(".")[0] == last]
    wanted, labels = label_names(model), _names(labels)
    if unfit or (rows and labels and wanted and sorted(labels) != sorted(wanted)):
        return Fitted(None, f"its head is for {_listed(labels)}" if labels else f"its {place} is of another size")
    if not rows or count == 1:
        return Fitted(tensors)
    if not labels or not wanted:
        return Fitted(tensors, assumed=True)
    order = [labels.index(label) for label in wanted]
    return Fitted({name: tensor[order] if name in rows else tensor for name, tensor in tensors.items()})


@contextmanager
def standing_in(module: nn.Module, tensors: Head) -> Iterator[None]:
    """Puts a head's tensors, by their names in the module, in the place of its own, in their precision and on their
    device."""
    own = dict(module.named_parameters())
    before = {name: own[name].data for name in tensors}
    for name, tensor in tensors.items():
        own[name].data = tensor.to(before[name])
    try:
        yield
    finally:
        for name, tensor in before.items():
            own[name].data = tensor


def _names(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels by name; none where they are numbers alone."""
    names = tuple(labels)
    return () if all(map(_NUMBER.fullmatch, names)) else names


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
