"""A pretrained model with the head that it was saved with."""

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from lamella.errors import LamellaError


def saved_class(config: Any) -> Any:
    """The class of transformers that a model was saved as; without a head where its config does not say."""
    named = config.architectures or ["AutoModel"]
    return getattr(transformers, named if isinstance(named, str) else str(named[0]), transformers.AutoModel)


def load_pretrained(name_or_path: str, dtype: str = "float32") -> PreTrainedModel:
    """A model from a folder or the Hugging Face hub, in evaluation mode, to be read from.

    Args:
        name_or_path: a folder, or a hub id.
        dtype: "float32", "bfloat16", "float16" or "auto" (as saved).

    Raises:
        LamellaError: there is no such model, or it cannot be loaded, or it is not whole.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        loader = saved_class(config)
        model, read = loader.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True)
    except Exception as error:  # damaged files make transformers and safetensors raise anything
        first_line = str(error).strip().split("\n")[0]
        raise LamellaError(
            f"The model {name_or_path!r} could not be loaded: {first_line} Give a folder or an id of the Hugging Face "
            "hub; the demo models are known by name to the command alone."
        ) from error
    refuse_holes(name_or_path, model, drawn(read))
    whole: PreTrainedModel = model.eval()
    return whole


def drawn(read: Mapping[str, Any]) -> tuple[str, ...]:
    """By what transformers says of a load, the tensors that the files lack and that are random therefore."""
    return tuple(sorted({*read["missing_keys"], *(name for name, *_ in read["mismatched_keys"])}))


def refuse_holes(name: str, model: PreTrainedModel, random: Sequence[str], new_head: bool = False) -> None:
    """Raises where tensors are random that belong to what was trained before.

    A pooler may be new, which nothing but a new head reads, and the head of a model that does not generate, as encoders
    are saved without theirs; with ``new_head`` any.
    """
    has_head = model.base_model is not model
    may_have_new = has_head and (new_head or not model.can_generate())
    inside = f"{model.base_model_prefix}." if may_have_new else ""
    old = [one for one in random if one.startswith(inside) and "pooler" not in one]
    if old:
        raise LamellaError(
            f"The model {name!r} is not whole: {len(old)} tensor(s) are missing or of another shape, the first "
            f"{old[0]}, and would be random. Restore it from a copy, or fetch it again."
        )
