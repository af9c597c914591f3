"""A token decoded at batch 1 by a cache, with each mixture beside one LoRA that is not merged.

The prompt is read once; that is in the time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lamella
from benchmarks.encoder import clone
from benchmarks.equality import Equality, compare
from benchmarks.measure import Timed, measure_case
from benchmarks.record import Benchmark, BenchSettings, Case, Record, Say, Target
from lamella import MolaConfig, MoleConfig, MolexConfig

_VOCABULARY = 512
_LORAS = 4


class DecodeSettings(BenchSettings):
    """A Llama of ``layers`` x ``hidden`` with random weights decodes ``tokens`` after a prompt of ``prompt``."""

    rounds: int = Field(5, ge=2)
    tokens: int = Field(16, ge=1)
    prompt: PositiveInt = 16
    layers: PositiveInt = 30
    hidden: PositiveInt = 576
    r: PositiveInt = 8
    num_experts: Literal["2-4-6-8"] = "2-4-6-8"


def run(settings: DecodeSettings, say: Say) -> list[Case]:
    """Compares decoding with one forward of the whole for each method, then times it for all.

    Raises:
        LamellaError: they differ in float64.
    """
    models = _models(settings)
    ids = torch.randint(3, _VOCABULARY, (1, settings.prompt))
    say("comparing decoding with one forward in float64")
    equality = _check(models, ids, settings.tokens)
    methods = {}
    for name, (model, what) in models.items():
        model.to(settings.device, settings.torch_dtype)
        methods[name] = Timed(what, partial(_generate, model, ids.to(settings.device), settings.tokens))
    say(f"timing {', '.join(methods)}")
    pairs = [("lora", "base"), *((name, "lora") for name in methods if name not in ("base", "lora"))]
    return [measure_case("decode", methods, pairs, equality, settings)]


def _models(settings: DecodeSettings) -> dict[str, tuple[nn.Module, str]]:
    """All of one base, whose weights they share; nothing is zero that would hide a path that is left out."""
    torch.manual_seed(0)
    heads = max(1, settings.hidden // 64)
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=settings.hidden, intermediate_size=8 * settings.hidden // 3,
        num_hidden_layers=settings.layers, num_attention_heads=heads, num_key_value_heads=heads,
        eos_token_id=None,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    lora = LoraConfig(r=settings.r, target_modules="all-linear", init_lora_weights=False)
    mola = MolaConfig(r=settings.r, num_experts=settings.num_experts, top_k=2, init_lora_weights=False)
    models = {
        "base": (base, "the model alone"),
        "lora": (get_peft_model(clone(base), lora), f"PEFT LoRA of rank {settings.r}, not merged"),
        "mola": (get_peft_model(clone(base), mola), f"MoLA {settings.num_experts}, r={settings.r}, top-2"),
        "molex": (
            get_peft_model(clone(base), MolexConfig(lora=lora)),
            f"MoLEx over LoRA of rank {settings.r}, whose routers choose another block at nearly every depth",
        ),
        "mole": (_composition(base, lora), f"MOLE of {_LORAS} LoRAs of rank {settings.r}"),
    }
    return {name: (model.eval(), what) for name, (model, what) in models.items()}


def _composition(base: Any, lora: LoraConfig) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(index) for index in range(_LORAS)]
        for path in paths:
            get_peft_model(clone(base), lora).save_pretrained(path)
        model: nn.Module = lamella.compose(clone(base), [str(path) for path in paths], MoleConfig())
    return model


def _generate(model: Any, ids: Tensor, tokens: int, **more: Any) -> Any:
    """Reads ``ids (1, prompt)`` and decodes so many tokens greedily, by a cache."""
    return model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **more)


@torch.no_grad()
def _check(models: dict[str, tuple[nn.Module, str]], ids: Tensor, tokens: int) -> Equality:
    decoded, whole = {}, {}
    for name, (model, _) in models.items():
        model.to("cpu", torch.float64)
        norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
        for norm in norms:  # transformers' own rounds to float32
            shape, eps = norm.weight.shape, norm.variance_epsilon
            norm.forward = partial(rms_norm, normalized_shape=shape, weight=norm.weight, eps=eps)
        text, first = _generate(model, ids, tokens), ids.shape[1]
        with lamella.prompt([first]):
            whole[name] = model(input_ids=text).logits  # (1, prompt + tokens, vocabulary)
            read = model(input_ids=text[:, :first], use_cache=True)
            logits = [read.logits]
            for at in range(first, text.shape[1]):
                logits.append(model(input_ids=text[:, at : at + 1], past_key_values=read.past_key_values).logits)
        decoded[name] = torch.cat(logits, dim=1)
        for norm in norms:
            del norm.forward
    return compare({"output": decoded.pop("base"), **decoded}, {"output": whole.pop("base"), **whole})


def targets(record: Record) -> Sequence[Target]:
    """Each mixture over LoRA; MoLEx runs two blocks where a guest is chosen, which bounds it by 2."""
    (case,) = record.cases
    return (
        Target("decode, mola / lora", case.ratio("mola", "lora"), most=1.15),
        Target(
            "decode, molex / lora (two blocks at nearly every depth: bound 2)", case.ratio("molex", "lora"), most=2.06
        ),
        Target(f"decode, mole of {_LORAS} / lora", case.ratio("mole", "lora"), most=1.10),
    )


def shape(settings: dict[str, Any]) -> str:
    """What was measured, in words."""
    return (
        f"A Llama of {settings['layers']} layers of {settings['hidden']}, random weights, {settings['tokens']} tokens "
        f"of one sequence after a prompt of {settings['prompt']}, all linear modules adapted"
    )


DECODE = Benchmark(
    DecodeSettings, {"rounds": 2, "tokens": 3, "prompt": 5, "layers": 4, "hidden": 64}, run, targets, shape
)
