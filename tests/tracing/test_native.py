"""Traces of models that came with experts, against a count made from the weights and inputs of their own routers."""

from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import tiny, tiny_moe
from torch import Tensor, nn

from lamella import LamellaError, MolaConfig, moe_layers
from lamella.tracing import COLUMNS, NATIVE, record_routing

FAMILIES = sorted(tiny_moe.FAMILIES)
DECODERS = [name for name in FAMILIES if name != "switch_transformers"]
ROUTERS = ("TopKRouter", "TopkRouter", "Top1Router")
every_family = pytest.mark.parametrize("family", FAMILIES)


class Truth:
    """Counts the indices that the model's own routers put out for the rows that ``mask_of`` calls real."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, Tensor] = {}
        self.dropped: dict[str, int] = {}
        self.tokens: dict[str, int] = {}
        self.mask_of: Any = None
        for name, module in model.named_modules():
            if type(module).__name__.endswith(ROUTERS):
                module.register_forward_hook(lambda _, __, output, name=name: self.count(name, output))

    def count(self, name: str, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if output[0].dtype == torch.int64:  # one-hot, all zero where the expert had no room
            choices = [[int(row.argmax())] if row.any() else [] for row in output[0].flatten(0, 1)]
            width, per_token = output[0].shape[-1], 1
        else:
            choices, width, per_token = output[2].tolist(), output[0].shape[-1], output[2].shape[-1]
        real = self.mask_of(name, len(choices)).flatten().tolist()
        counts = self.counts.setdefault(name, torch.zeros(width, dtype=torch.long))
        for chosen, is_real in zip(choices, real, strict=True):
            if is_real:
                for expert in chosen:
                    counts[expert] += 1
                self.dropped[name] = self.dropped.get(name, 0) + per_token - len(chosen)
                self.tokens[name] = self.tokens.get(name, 0) + 1


def assert_trace_is(trace: Any, truth: Truth) -> None:
    actual = {f"{stack}.{layer}.{module}": key for key in trace.counts for _, stack, layer, module in [key]}
    named = {name.rpartition(".")[0]: name for name in truth.counts}
    assert actual.keys() == named.keys()
    frame = trace.frame.groupby(["adapter", "stack", "layer", "module"]).tokens.first()
    for module, key in actual.items():
        name = named[module]
        assert trace.counts[key].tolist() == truth.counts[name].tolist(), name
        assert int(trace.dropped[key].sum()) == truth.dropped[name], name
        assert frame[key] == truth.tokens[name]


@every_family
@pytest.mark.parametrize("padding", ["left", "right", None])
@torch.no_grad()
def test_counts_are_the_routers_own_of_real_tokens(family, padding):
    model = tiny_moe.FAMILIES[family]()
    given = tiny_moe.inputs_for(model, padding=padding)
    truth = Truth(model)
    truth.mask_of = lambda name, rows: (
        given["labels"].ne(-100) if name.startswith("decoder") else given["attention_mask"].bool()
    )
    with record_routing(model) as trace:
        for _ in range(2):
            model(**given)
    assert_trace_is(trace, truth)
    frame = trace.frame
    assert tuple(frame.columns) == COLUMNS
    assert set(frame.adapter) == {NATIVE}
    assert frame.groupby(["stack", "layer"])["share"].sum().to_numpy() == pytest.approx(1)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@torch.no_grad()
def test_counts_with_a_cache(family, beams, cache):
    model = tiny_moe.FAMILIES[family]()
    given = tiny_moe.inputs(batch=2, tokens=6)
    truth, mask, fed = Truth(model), given["attention_mask"].bool().repeat_interleave(beams, 0), [0]

    def forward(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        fed[0] = kwargs["input_ids"].shape[1]

    def mask_of(name: str, rows: int) -> Tensor:
        batch, new = rows // fed[0], fed[0]
        prompt = mask if batch == len(mask) else given["attention_mask"].bool()
        if new >= prompt.shape[1]:
            return torch.cat([prompt, torch.ones(batch, new - prompt.shape[1], dtype=torch.bool)], dim=1)
        return torch.ones(batch, new, dtype=torch.bool)

    truth.mask_of = mask_of
    model.register_forward_pre_hook(forward, with_kwargs=True)
    settings = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    with record_routing(model) as trace:
        model.generate(**given, num_beams=beams, max_new_tokens=4, min_new_tokens=4, do_sample=False, **settings)
    assert_trace_is(trace, truth)


@torch.no_grad()
def test_counts_while_an_encoder_decoder_generates():
    model = tiny_moe.FAMILIES["switch_transformers"]()
    given = tiny_moe.inputs(batch=2, tokens=6)
    truth = Truth(model)
    truth.mask_of = lambda name, rows: (
        torch.ones(rows) if name.startswith("decoder") else given["attention_mask"]
    ).bool()
    with record_routing(model) as trace:
        model.generate(**given, num_beams=2, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert_trace_is(trace, truth)


@every_family
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_each_token_once(family, use_reentrant):
    model = tiny_moe.FAMILIES[family]().train()
    model.enable_input_require_grads()
    given = tiny_moe.inputs_for(model)
    given.setdefault("labels", given["input_ids"].masked_fill(given["attention_mask"] == 0, -100))

    def traced() -> pd.DataFrame:
        torch.manual_seed(0)  # Phi-MoE samples its experts in training
        with record_routing(model) as trace:
            model(**given).loss.backward()
        return trace.frame

    plain = traced()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    pd.testing.assert_frame_equal(plain, traced())
    assert (plain.groupby(["stack", "layer"]).tokens.first() > 0).all()


@every_family
@torch.no_grad()
def test_tokens_are_the_choices_behind_the_counts(family):
    model = tiny_moe.FAMILIES[family]()
    given = tiny_moe.inputs_for(model)
    with record_routing(model, per_token=True) as trace:
        model(**given)
    tokens = trace.tokens
    for key, counts in trace.counts.items():
        own = tokens[(tokens["stack"] == key[1]) & (tokens["layer"] == key[2])]
        assert own.expert.value_counts().reindex(range(len(counts)), fill_value=0).tolist() == counts.tolist()
        mask = given["labels"].ne(-100) if key[1] == "decoder.block" else given["attention_mask"]
        places = set(zip(own.sequence, own.position, strict=True))
        assert places <= set(map(tuple, mask.nonzero().tolist()))
        assert (len(places) == int(mask.sum())) == (int(trace.dropped[key].sum()) == 0)


@torch.no_grad()
def test_dropped_tokens_are_apart_and_not_expert_zero_s():
    model = tiny_moe.FAMILIES["switch_transformers"]()
    ids = torch.full((2, 6), 7)  # the same token everywhere
    with record_routing(model, per_token=True) as trace:
        model(input_ids=ids, labels=ids)
    first = trace.frame[trace.frame.layer == 1].iloc[:4]
    assert set(first.tokens) == {12}
    key = next(iter(trace.counts))
    assert int(trace.counts[key].sum() + trace.dropped[key].sum()) == 12
    assert int(trace.dropped[key].sum()) > 0
    assert first.dropped.tolist() == trace.dropped[key].tolist()
    together = trace.coactivation.query("layer == 1 and stack == @key[1] and expert == other")
    assert together.share.to_numpy() == pytest.approx((trace.counts[key] / 12).numpy())


@torch.no_grad()
def test_a_mask_and_the_trace_agree():
    model = tiny_moe.FAMILIES["deepseek_v3"]()
    layer = moe_layers(model)[1]
    with record_routing(model) as trace, layer.mask([0, 4]):
        model(**tiny_moe.inputs())
    counts = trace.counts[NATIVE, layer.place.stack, layer.place.layer, layer.place.module]
    assert counts[[0, 4]].tolist() == [0, 0]
    assert counts.sum() == 3 * 18


@torch.no_grad()
def test_with_an_adapter_both_are_recorded_and_told_apart():
    model = tiny_moe.FAMILIES["mixtral"]()
    given = tiny_moe.inputs()
    with record_routing(model) as alone:
        model(**given)
    mixed = get_peft_model(model, MolaConfig(r=2, num_experts=3, top_k=1, target_modules=["q_proj"])).eval()
    with record_routing(mixed) as trace:
        mixed(**given)
    own = {key: counts.tolist() for key, counts in trace.counts.items() if key[0] == NATIVE}
    # B is zero at the start, so the adapter changes nothing
    assert own == {key: counts.tolist() for key, counts in alone.counts.items()}
    assert set(trace.frame["stack"]) == {"model.layers"}
    adapter = trace.frame[trace.frame.adapter == "default"]
    assert set(adapter.module) == {"self_attn.q_proj"}
    assert set(adapter.tokens) == {18}
    assert set(adapter.dropped) == {0}


@torch.no_grad()
def test_a_plain_lora_over_a_mixture_is_recorded_too():
    model = get_peft_model(tiny_moe.FAMILIES["qwen3_moe"](), LoraConfig(target_modules=["q_proj"])).eval()
    with record_routing(model) as trace:
        model(**tiny_moe.inputs())
    assert set(trace.frame.tokens) == {18}


@every_family
@torch.no_grad()
def test_recording_leaves_the_model_as_it_was(family):
    model = tiny_moe.FAMILIES[family]()
    given = tiny_moe.inputs_for(model)
    before = model(**given).logits
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), set(vars(m))) for m in model.modules()]
    with record_routing(model) as trace:
        assert torch.equal(model(**given).logits, before)
    counts = trace.counts
    model(**given)
    assert all(torch.equal(counts[key], now) for key, now in trace.counts.items())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks), set(vars(m))) for m in model.modules()]


def test_a_dense_model_without_an_adapter_is_an_error():
    with pytest.raises(LamellaError, match="is not a mixture of experts"), record_routing(tiny.llama()):
        pass
