"""Recomputed blocks and guests give the gradients of kept ones, and are counted once."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests import tiny

from lamella.tracing import record_routing

MODES = {"none": None, "non-reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


def prepared(name: str, mode: str, **config: Any):
    model = (
        tiny.molex(tiny.build(name).double(), router_aux_loss_coef=0.5, alpha_mode="learned", **config).double().train()
    )
    if MODES[mode] is not None:
        model.gradient_checkpointing_enable(MODES[mode])
        model.enable_input_require_grads()  # reentrant checkpointing sees no parameters
    return model


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "non-reentrant") for name in tiny.PATHS]
    + [("bert", "reentrant"), ("llama", "reentrant"), ("t5", "reentrant")],
)
def test_gradients_and_traces_are_the_same_with_and_without(name: str, mode: str) -> None:
    results, traces = [], []
    for each in ("none", mode):
        model = prepared(name, each, granularity="token" if name == "bert" else "sequence")
        with record_routing(model) as trace:
            (3 * model(**tiny.batch(model.get_base_model())).loss).backward()
        results.append(tiny.gradients(model))
        traces.append(trace.counts)
    assert any("molex_router" in key for key in results[0])
    tiny.assert_same(results[1], results[0])
    assert all(torch.equal(traces[1][key], counts) for key, counts in traces[0].items())


def forwards_of(model, batch) -> int:
    runs = []
    hooks = [block.base_layer.register_forward_pre_hook(lambda *_: runs.append(1)) for block in tiny.blocks(model)]
    model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    return len(runs)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_guests_recomputed_by_themselves(name: str) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2)
    results, counts = [], []
    for recompute in (False, True):
        model = prepared(name, "none", recompute_guest=recompute, lora=lora)
        batch = tiny.batch(model.get_base_model())
        counts.append(forwards_of(model, batch))
        model.zero_grad()
        torch.manual_seed(1)  # the same dropout when recomputed
        model(**batch).loss.backward()
        results.append(tiny.gradients(model))
    tiny.assert_same(results[1], results[0])
    stacks = 2 if name == "t5" else 1
    assert counts[1] - counts[0] == counts[0] - 4 * stacks > 0, "every guest again, and no host"


def test_guests_inside_checkpointing_are_not_recomputed_twice() -> None:
    model = prepared("llama", "non-reentrant", recompute_guest=True)
    other = prepared("llama", "non-reentrant")
    batch = tiny.batch(model.get_base_model())
    assert forwards_of(model, batch) == forwards_of(other, batch)
