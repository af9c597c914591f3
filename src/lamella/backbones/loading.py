"""A pretrained model with the head that it was saved with."""

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from lamella.errors import LamellaError


def saved_class(config: Any) -> Any:
    """The class of transformers that a model was saved as; without a head where its config does not say."""
    return getattr(transformers, next(iter(config.architectures or []), "AutoModel"), transformers.AutoModel)


def load_pretrained(name_or_path: str, dtype: str = "float32") -> PreTrainedModel:
    """A model from a folder or the Hugging Face hub, in evaluation mode, to be read from.

    Args:
        name_or_path: a folder, or a hub id.
        dtype: "float32", "bfloat16", "float16" or "auto" (as saved).

    Raises:
        LamellaError: there is no such model, or it cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        model: PreTrainedModel = saved_class(config).from_pretrained(name_or_path, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise LamellaError(
            f"The model {name_or_path!r} could not be loaded: {first_line} Give a folder or an id of the Hugging Face "
            "hub; the demo models are known by name to the command alone."
        ) from error
    return model.eval()
