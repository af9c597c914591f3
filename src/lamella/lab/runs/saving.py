"""From a trained model to files and back: complete folders, strict loading, and the proof that both agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel

from lamella.errors import LamellaError
from lamella.files import atomic
from lamella.lab.data import load_backbone
from lamella.lab.methods import Method
from lamella.lab.runs.folder import RunFolder

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task

# kernels may differ between two loads on an accelerator; on a CPU the difference is 0
_TOLERANCE = 1e-5


def save_trained(
    model: PreTrainedModel | PeftModel, method: Method, backbone: Backbone, folder: RunFolder, card: str
) -> None:
    """Write ``adapter/`` (PEFT's format) or, for a model without adapter, ``model/``, with tokenizer and model card.

    An adapter names its base as others know it, not a folder of this machine.
    """
    with atomic(folder.path / _name(model)) as path:
        if isinstance(model, PeftModel):
            model.active_peft_config.base_model_name_or_path = backbone.published
            method.save(model, path)
        else:
            model.save_pretrained(path)
        backbone.tokenizer.save_pretrained(path)
        (path / "README.md").write_text(card, encoding="utf-8")  # in place of the empty form that PEFT writes


def load_weights(model: PreTrainedModel | PeftModel, checkpoint: Path) -> None:
    """Put the weights of a checkpoint into a model of the same make.

    Raises:
        LamellaError: the checkpoint lacks a trainable tensor or has one that the model does not know.
    """
    if not isinstance(model, PeftModel):
        load_model(model, checkpoint / "model.safetensors")
        return
    weights = load_peft_weights(str(checkpoint), device=_device(model))
    wrong = sorted(weights.keys() ^ get_peft_model_state_dict(model).keys())
    if wrong:
        raise LamellaError(
            f"{checkpoint.name} does not fit this model: {wrong[0]} is missing or unknown. It was written by another "
            "version or other settings; start the run afresh with --force."
        )
    set_peft_model_state_dict(model, weights)


def go_on_from(model: nn.Module, method: Method, run: Path) -> None:
    """Put the adapter and the head that a run trained into a model that is to be trained on.

    Raises:
        LamellaError: the run has no adapter, or one that the method cannot go on from.
    """
    folder = run / "adapter"
    if not isinstance(model, PeftModel) or not folder.is_dir():
        raise LamellaError(f"start names {run}, and only an adapter of a finished run can be trained on.")
    saved, now = load_peft_weights(str(folder), device=_device(model)), get_peft_model_state_dict(model)
    try:
        set_peft_model_state_dict(model, method.taken_up(saved, now))
    except LamellaError as error:
        raise LamellaError(f"start names {run}, and {error}") from error


def check_saved(
    model: PreTrainedModel | PeftModel,
    method: Method,
    folder: RunFolder,
    backbone: str,
    task: Task,
    batch: Mapping[str, torch.Tensor],
) -> tuple[dict[str, Any], PreTrainedModel | PeftModel]:
    """Load the saved run onto a fresh backbone and compare its logits on one batch with those of ``model``.

    Returns:
        ``equal`` (bit for bit) and ``largest_difference`` of the logits; and the model that was loaded.

    Raises:
        LamellaError: they differ by more than rounding.
    """
    path = folder.path / _name(model)
    if isinstance(model, PeftModel):
        loaded: Any = method.load(load_backbone(backbone, task), task, path)
    else:
        loaded = type(model).from_pretrained(path)
    device = _device(model)
    inputs = {key: value.to(device) for key, value in batch.items()}
    with torch.no_grad():
        ours = model.eval()(**inputs).logits
        theirs = loaded.to(device).eval()(**inputs).logits
    difference = float((ours - theirs).abs().max())
    if difference > _TOLERANCE * max(1.0, float(ours.abs().max())):
        raise LamellaError(
            f"The saved {path.name} does not give the outputs of the model it was saved from (largest difference "
            f"{difference:.3g}). Something that was trained is not in the file: name it in modules_to_save."
        )
    return {"equal": bool(torch.equal(ours, theirs)), "largest_difference": difference}, loaded


def _name(model: PreTrainedModel | PeftModel) -> str:
    return "adapter" if isinstance(model, PeftModel) else "model"


def _device(model: PreTrainedModel | PeftModel) -> str:
    return str(next(model.parameters()).device)
