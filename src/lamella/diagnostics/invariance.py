"""What may not change a model's answers: padding, and the cache of a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from lamella.diagnostics.parts import device_of, longest_input, to_device, transformer, values_of
from lamella.diagnostics.roundtrip import tolerance
from lamella.diagnostics.undisturbed import undisturbed
from lamella.findings import Examination

_PADDING = 3
_PROMPT, _GENERATED = 8, 5


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
    with undisturbed(model), torch.no_grad():
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
    with undisturbed(model), torch.no_grad():
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
    own = transformer(model).generation_config
    config = GenerationConfig(
        max_new_tokens=_GENERATED, min_new_tokens=_GENERATED, do_sample=False, use_cache=use_cache,
        output_logits=True, return_dict_in_generate=True, bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id,
        pad_token_id=_pad_token(model), decoder_start_token_id=own.decoder_start_token_id,
    )  # fmt: skip
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
