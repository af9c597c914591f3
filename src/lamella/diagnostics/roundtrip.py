"""Save, load, compare: the files of a model give back the model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from lamella.diagnostics.parts import device_of, to_device, values_of
from lamella.diagnostics.undisturbed import twin, undisturbed
from lamella.findings import Examination


def examine_roundtrip(model: nn.Module, batch: Mapping[str, Any] | None, examination: Examination) -> None:
    """Saves the active adapter, or a model without one, to a temporary folder, loads it and compares.

    The model itself is not touched: a copy on the same memory is saved, and that copy without its adapter is the base
    for loading. Without a batch, tensors alone are compared.
    """
    if not isinstance(model, PeftModel) and (hasattr(model, "peft_config") or not isinstance(model, PreTrainedModel)):
        examination.saw("saved loads equal: not examined, this is no PeftModel and no model of transformers")
        return
    with undisturbed(model), tempfile.TemporaryDirectory() as scratch:
        try:
            loaded = _saved_and_loaded(model, Path(scratch)).to(device_of(model))
        except (ValueError, RuntimeError, KeyError) as error:
            _report(f"what was saved cannot be loaded: {error}", "the saved folder", examination)
            return
        ours = _state(model)
        _compare(ours, _state(loaded), examination)
        if batch is not None:
            _compare_outputs(model, loaded, to_device(batch, device_of(model)), examination)
    outputs = "outputs on one batch" if batch is not None else "no outputs, for want of a batch"
    examination.saw(f"saved loads equal: {len(ours)} tensors bit by bit, and {outputs}")


def _saved_and_loaded(model: PeftModel | PreTrainedModel, folder: Path) -> nn.Module:
    copied = twin(model)
    if not isinstance(model, PeftModel):
        copied.save_pretrained(folder)
        whole: nn.Module = type(model).from_pretrained(folder)
        return whole
    adapter = model.active_adapter
    copied.save_pretrained(str(folder), selected_adapters=[adapter])
    base = copied.get_base_model() if model.active_peft_config.is_prompt_learning else copied.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config  # PEFT would take it for another adapter
    return PeftModel.from_pretrained(base, str(folder if adapter == "default" else folder / adapter))


def _state(model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(model, PeftModel):
        return model.state_dict()
    state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    return state


def _compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], examination: Examination) -> None:
    unequal = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        mine, other = ours[name].detach().cpu(), theirs[name].detach().cpu()
        # PEFT widens half precision when it loads, which loses nothing
        if mine.shape != other.shape or not torch.equal(mine.to(other.dtype), other):
            unequal.append(name)
    if unequal:
        _report(f"{len(unequal)} tensors of the loaded model are not those of the saved one", unequal, examination)


def _compare_outputs(model: nn.Module, loaded: nn.Module, batch: Mapping[str, Any], examination: Examination) -> None:
    with torch.no_grad():
        ours, theirs = (values_of(one.eval()(**batch)) for one in (model, loaded))
    difference = float((ours.float() - theirs.float()).abs().max())
    if not difference <= tolerance(ours):
        _report(f"the loaded model's outputs differ by up to {difference:.3g}", "outputs on one batch", examination)


def tolerance(values: Tensor) -> float:
    """The largest difference that rounding explains between two ways to compute ``values``."""
    relative = {torch.float64: 1e-9, torch.float32: 1e-4}.get(values.dtype, 5e-2)
    return relative * (0.1 + float(values.abs().max()))  # a little for outputs that are all but zero


def _report(what: str, where: str | list[str], examination: Examination) -> None:
    examination.error(
        "saved-unequal",
        what,
        where,
        "the model that is used later is not the one that was trained",
        "name every trained module outside the method in modules_to_save; change weights only through the model",
    )
