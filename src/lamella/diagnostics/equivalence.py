"""What may not change a model's answers: saving and loading it, padding, and the cache of a decoder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lamella.diagnostics.running import (
    base_of,
    clone,
    device_of,
    longest_input,
    preserve_state,
    to_device,
    transformer,
    values_of,
)
from lamella.findings import Examination

_PADDING = 3
_PROMPT, _GENERATED = 8, 5


def examine_roundtrip(model: nn.Module, batch: Mapping[str, Any] | None, examination: Examination) -> None:
    """Saves the active adapter, or a model without one, to a temporary folder, loads it and compares.

    The model itself is not touched: a copy on the same memory is saved, and that copy without its adapter is the base
    for loading. Without a batch, tensors alone are compared.
    """
    if not isinstance(model, PeftModel) and (hasattr(model, "peft_config") or not isinstance(model, PreTrainedModel)):
        examination.saw("saved loads equal: not examined, this is neither a PeftModel nor a model of transformers")
        return
    with preserve_state(model), tempfile.TemporaryDirectory() as scratch:
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
    copied = clone(model)
    if not isinstance(model, PeftModel):
        copied.save_pretrained(folder)
        loaded: nn.Module = type(model).from_pretrained(folder)
        return loaded
    adapter = model.active_adapter
    copied.save_pretrained(str(folder), selected_adapters=[adapter])
    return PeftModel.from_pretrained(base_of(copied), str(folder if adapter == "default" else folder / adapter))


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


def examine_padding(model: nn.Module, batch: Mapping[str, Any], examination: Examination) -> None:
    """Pads the batch on the right by a few tokens more and compares the outputs at the tokens it had."""
    pad = _pad_token(model)
    if pad is None or "input_ids" not in batch:
        examination.saw("padding changes nothing: not examined, the model has no pad token or takes no token ids")
        return
    plain = _inputs(model, batch)
    filled = dict(plain)
    for name, filler in (("input_ids", pad), ("attention_mask", 0), ("token_type_ids", 0)):
        if name in plain:
            filled[name] = nn.functional.pad(plain[name], (0, _PADDING), value=filler)
    with preserve_state(model), torch.no_grad():
        model.eval()
        ours, theirs = values_of(model(**plain)), values_of(model(**filled))
    if ours.shape != theirs.shape:  # an output per token, after those of a soft prompt where there is one
        real = nn.functional.pad(
            plain["attention_mask"].bool(), (ours.shape[1] - plain["input_ids"].shape[1], 0), value=1
        )
        ours, theirs = ours[real], theirs[:, : ours.shape[1]][real]
    difference = float((ours - theirs).abs().max())
    if not difference <= tolerance(ours):
        examination.error(
            "padding-changes-output",
            f"{_PADDING} more padding tokens change the outputs at real tokens by up to {difference:.3g}",
            type(transformer(model)).__name__,
            "an answer then depends on what else is in the batch, and scores on the batch size",
            "pass attention_mask; look for a module that pools or normalises over all positions",
        )
    examination.saw(f"padding changes nothing: {_PADDING} tokens more, largest difference {difference:.2g}")


def examine_cache(model: nn.Module, batch: Mapping[str, Any], examination: Examination) -> None:
    """Generates from the first row greedily, with and without a cache, and compares the logits of each step."""
    inner = transformer(model)
    if not (hasattr(inner, "can_generate") and inner.can_generate()) or "input_ids" not in batch:
        examination.saw("cached equals uncached: not examined, the model does not generate")
        return
    prompt = _prompt(model, batch)
    with preserve_state(model), torch.no_grad():
        model.eval()
        cached, uncached = (_generate(model, prompt, use_cache) for use_cache in (True, False))
    difference = 0.0
    for step, (ours, theirs) in enumerate(zip(cached.logits, uncached.logits, strict=True)):
        difference = max(difference, float((ours.float() - theirs.float()).abs().max()))
        if not difference <= tolerance(theirs):
            examination.error(
                "cache-changes-output",
                f"with a cache the logits of generated token {step + 1} differ by {difference:.3g}",
                type(inner).__name__,
                "generate uses the cache, and its text is not what the model was trained for",
                "look for a module that reads other positions than its own token's; generate with use_cache=False",
            )
            break
        if not torch.equal(ours.argmax(-1), theirs.argmax(-1)):
            break  # a tie within rounding: from here on the texts differ rightly
    examination.saw(f"cached equals uncached: {_GENERATED} generated tokens, largest difference {difference:.2g}")


def _pad_token(model: nn.Module) -> int | None:
    pad = getattr(getattr(transformer(model), "config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else None


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Ids and masks of the batch without labels, short enough for more padding."""
    limit = longest_input(model)
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: batch[name][..., : None if limit is None else limit - _PADDING] for name in names if name in batch}
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    if getattr(getattr(transformer(model), "config", None), "is_encoder_decoder", False):
        ids = batch.get("decoder_input_ids")
        inputs["decoder_input_ids"] = inputs["input_ids"][..., :_PROMPT] if ids is None else ids
    return to_device(inputs, device_of(model))


def _prompt(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The first real tokens of the first row, ``(1, T)``."""
    ids = batch["input_ids"][:1]
    mask = batch.get("attention_mask")
    real = ids if mask is None else ids[:, mask[0].bool()]
    return real[:, :_PROMPT].to(device_of(model))


def _generate(model: Any, prompt: Tensor, use_cache: bool) -> Any:
    defaults = transformer(model).generation_config
    config = GenerationConfig(
        max_new_tokens=_GENERATED, min_new_tokens=_GENERATED, do_sample=False, use_cache=use_cache,
        output_logits=True, return_dict_in_generate=True,
        bos_token_id=defaults.bos_token_id, eos_token_id=defaults.eos_token_id,
        pad_token_id=_pad_token(model), decoder_start_token_id=defaults.decoder_start_token_id,
    )  # fmt: skip
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
