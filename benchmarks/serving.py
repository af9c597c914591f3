"""A mixture of experts that decodes a batch with few experts of each layer: how fast, and how well it predicts."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from benchmarks.equality import Equality, compare
from benchmarks.measure import Timed, measure_case
from benchmarks.record import Benchmark, BenchSettings, Case, Record, Say, Target
from lamella.backbones.moe import moe_layers
from lamella.lab.data import load_backbone, load_task
from lamella.similarity import capture, damages, reroute, text_batches
from lamella.similarity.compression import next_choice

if TYPE_CHECKING:
    import pandas as pd

_VOCABULARY = 512


class ServingSettings(BenchSettings):
    """``tokens`` are decoded of ``batch`` sequences together, each given its own next token, by a cache.

    tiny-moe is measured with each of ``limits`` on ``documents`` of the test part of ``text`` that have
    ``tokens / batch`` tokens, by damages of what its training part holds; None takes random tokens for both. The wide
    model is random: ``wide_layers`` of ``experts`` experts, ``top_k`` of them for a token, of ``width`` features and as
    many hidden units.
    """

    rounds: int = Field(5, ge=2)
    tokens: int = Field(512, ge=1)
    batch: PositiveInt = 16
    text: str | None = "news"
    documents: PositiveInt = 128
    limits: tuple[PositiveInt, ...] = (6, 5, 4)
    wide_limits: tuple[PositiveInt, ...] = (32, 16, 8)
    wide_layers: PositiveInt = 2
    experts: PositiveInt = 64
    top_k: PositiveInt = 8
    width: PositiveInt = 512

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.tokens // self.batch


@dataclass(frozen=True)
class _Served:
    """A model, the texts that it decodes ``(documents, tokens)``, and the damages among its experts."""

    model: nn.Module
    texts: Tensor
    damage: pd.DataFrame
    chance: pd.DataFrame  # the same table with random damages
    batch: int

    def limited(self, limit: int, by_chance: bool = False) -> AbstractContextManager[None]:
        """At most so many experts of a layer, tokens going to the one that does least damage."""
        table = self.chance if by_chance else self.damage
        return reroute(self.model, self._names, what="limited", limit=limit, damage=table)

    def next_choices(self, limit: int) -> AbstractContextManager[None]:
        """The same experts, tokens going where the router then sends them."""
        return next_choice(self.model, self._names, "limited", limit=limit, damage=self.damage)

    @property
    def _names(self) -> list[tuple[int, int]]:
        return [(layer.index, e) for layer in moe_layers(self.model) for e in range(layer.num_experts)]

    @torch.no_grad()
    def decoded(self, ways: AbstractContextManager[None]) -> Tensor:
        """Logits ``(batch, tokens, vocabulary)`` of the first batch, token by token."""
        ids, cache, logits = self.texts[: self.batch], None, []
        with ways:
            for at in range(ids.shape[1]):
                output = self.model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits)
        return torch.cat(logits, dim=1)

    @torch.no_grad()
    def perplexity(self, ways: AbstractContextManager[None]) -> float:
        """Of all texts, batch by batch; one forward of whole texts decides as decoding them does."""
        with ways:
            losses = [
                cross_entropy(self.model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
                for ids in self.texts.split(self.batch)
            ]
        return math.exp(float(torch.stack(losses).mean()))

    def equality(self, limit: int) -> Equality:
        """In float64: no limit beside one of all experts, and decoding beside one forward of whole texts."""
        model: Any = self.model
        dtype, before = next(model.parameters()).dtype, model.get_experts_implementation()
        model.double().set_experts_implementation("eager")  # grouped products have no float64
        every = max(layer.num_experts for layer in moe_layers(model))
        with torch.no_grad(), self.limited(limit):
            whole = model(input_ids=self.texts[: self.batch]).logits
        off, all_experts = self.decoded(nullcontext()), self.decoded(self.limited(every))
        compared = compare(
            {"output": all_experts, "limited": self.decoded(self.limited(limit))}, {"output": off, "limited": whole}
        )
        model.to(dtype).set_experts_implementation(before)
        return compared


def run(settings: ServingSettings, say: Say) -> list[Case]:
    """Times decoding without and with limits, on tiny-moe and on a wide random model, equality of the logits first.

    Raises:
        LamellaError: a limit of all experts changes something, or decoding decides otherwise than one forward.
    """
    say("tiny-moe")
    tiny = _tiny(settings)
    cases = [_case("tiny-moe, 8 experts, top-2", tiny, settings.limits, settings, predicts=True)]
    say(f"{settings.experts} experts")
    name = f"{settings.experts} experts, top-{settings.top_k}, {settings.wide_layers} layers of {settings.width}"
    return [*cases, _case(name, _wide(settings), settings.wide_limits, settings, predicts=False)]


def _case(name: str, served: _Served, limits: Sequence[int], settings: ServingSettings, predicts: bool) -> Case:
    ways: dict[str, tuple[str, Callable[[], AbstractContextManager[None]]]] = {"off": ("every expert", nullcontext)}
    for limit in limits:
        ways[f"{limit} experts"] = (f"at most {limit} a batch, by damage", partial(served.limited, limit))
    last = limits[-1]
    ways[f"{last}, next choice"] = (
        f"the same {last}, the router choosing among them",
        partial(served.next_choices, last),
    )
    ways[f"{last}, at random"] = (
        f"{last} by random damages: the control", partial(served.limited, last, by_chance=True)
    )  # fmt: skip
    equality = served.equality(limits[0])
    timed = {way: Timed(what, lambda enter=enter: served.decoded(enter())) for way, (what, enter) in ways.items()}  # type: ignore[misc]
    case = measure_case(name, timed, [(way, "off") for way in list(ways)[1:]], equality, settings)
    if not predicts:
        return case
    methods = [
        method.model_copy(update={"perplexity": served.perplexity(ways[method.name][1]())}) for method in case.methods
    ]
    return case.model_copy(update={"methods": methods})


def _tiny(settings: ServingSettings) -> _Served:
    backbone = load_backbone("tiny-moe")
    model, tokenizer = backbone.model.eval(), backbone.tokenizer
    if settings.text is None:
        texts = torch.randint(3, _VOCABULARY, (settings.documents, settings.length))
        given: Any = [{"input_ids": one} for one in texts.split(settings.batch)]
    else:
        task = load_task(settings.text)
        given = text_batches(task, tokenizer, split="train").shuffled()
        held_out = (
            ids[real.bool()]
            for batch in text_batches(task, tokenizer, split="test")
            for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        )
        long = [ids[: settings.length] for ids in held_out if len(ids) >= settings.length]
        texts = torch.stack(long[: settings.documents])
    with tempfile.TemporaryDirectory() as folder:
        table = damages(capture(model, given, folder, per_expert=256), model)
    return _on(_Served(model, texts, table, _by_chance(table), settings.batch), settings)


def _wide(settings: ServingSettings) -> _Served:
    config = Qwen3MoeConfig(
        vocab_size=_VOCABULARY, hidden_size=settings.width, num_hidden_layers=settings.wide_layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=settings.width // 8, num_experts=settings.experts,
        num_experts_per_tok=settings.top_k, moe_intermediate_size=settings.width, decoder_sparse_step=1,
        norm_topk_prob=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in moe_layers(model):
        for router in layer.router_module.parameters():
            nn.init.normal_(router, std=settings.width**-0.5)
    texts = torch.randint(3, _VOCABULARY, (settings.batch, settings.length))
    with tempfile.TemporaryDirectory() as folder:
        table = damages(capture(model, [{"input_ids": texts}], folder, per_expert=16), model)
    return _on(_Served(model, texts, table, _by_chance(table), settings.batch), settings)


def _by_chance(table: pd.DataFrame) -> pd.DataFrame:
    generator = torch.Generator().manual_seed(0)
    return table.assign(damage=torch.rand(len(table), generator=generator, dtype=torch.float64).numpy())


def _on(served: _Served, settings: ServingSettings) -> _Served:
    model = served.model.to(settings.device, settings.torch_dtype)
    return _Served(model, served.texts.to(settings.device), served.damage, served.chance, served.batch)


def targets(record: Record) -> Sequence[Target]:
    """Of each limit the tokens a second beside those without one, and the perplexity."""
    figures: list[Target] = []
    for case in record.cases:
        off = case.method("off")
        for method in case.methods[1:]:
            speed = 1 / case.ratio(method.name, "off").median
            figures.append(Target(f"{case.name}: tokens/s, {method.name} / off", speed))
            if method.perplexity is not None and off.perplexity is not None:
                rise = method.perplexity / off.perplexity
                figures.append(Target(f"{case.name}: perplexity, {method.name} / off", rise))
    return figures


def shape(settings: dict[str, Any]) -> str:
    """What was measured, in words."""
    text = f"the test part of {settings['text']}" if settings["text"] else "random tokens"
    return (
        f"{settings['tokens']:,} tokens of {settings['batch']} sequences decoded together, token by token; perplexity "
        f"of the first {settings['tokens'] // settings['batch']} tokens of {settings['documents']} documents of {text}"
    )


_QUICK = {
    "rounds": 2, "tokens": 8, "batch": 4, "text": None, "documents": 4, "limits": (4,), "wide_limits": (4,),
    "wide_layers": 1, "experts": 8, "top_k": 2, "width": 16,
}  # fmt: skip
SERVING = Benchmark(ServingSettings, _QUICK, run, targets, shape)
