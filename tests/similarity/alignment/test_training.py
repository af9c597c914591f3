"""Batched training is training of each pair alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import similarity_align as reference
from tests.similarity.alignment.fakes import random_expert
from tests.tiny_moe import FAMILIES

from lamella.aligners import KINDS, make_aligner
from lamella.backbones.moe import moe_layers
from lamella.backbones.moe.expert import Gated
from lamella.similarity.alignment.frozen import FrozenExpert, HiddenUnits, Swiglu, hidden_units
from lamella.similarity.alignment.stack import start_stack, unstack
from lamella.similarity.alignment.training import stack_tokens, train

TRAINED = [kind for kind in KINDS if kind != "identity"]


def _case(kind, counts, hidden, ff, rank, gate):
    generator = torch.Generator().manual_seed(3)
    target = random_expert(hidden, ff, 1, torch.float64, gate)
    sources = [random_expert(hidden, ff, 10 + at, torch.float64, gate) for at in range(len(counts))]
    xs = [torch.randn(n, hidden, generator=generator, dtype=torch.float64) for n in counts]
    tokens = [(x, source(x)) for x, source in zip(xs, sources, strict=True)]
    stops = [(x[::2] + 0.1, source(x[::2] + 0.1)) for x, source in zip(xs, sources, strict=True)]
    generators = [torch.Generator().manual_seed(at) for at in range(len(counts))]
    stack = start_stack(kind, hidden, rank, generators, xs)
    return target, tokens, stops, stack


@pytest.mark.parametrize("kind", TRAINED)
@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.integers(2, 20), min_size=1, max_size=4),
    hidden=st.integers(2, 12),
    ff=st.integers(2, 12),
    gate=st.booleans(),
    stopping=st.booleans(),
)
def test_a_stack_is_its_pairs_trained_one_by_one(kind, counts, hidden, ff, gate, stopping):
    rank = max(1, hidden // 3)
    target, tokens, stops, stack = _case(kind, counts, hidden, ff, rank, gate)
    starts = [{name: one[at].clone() for name, one in stack.parameters.items()} for at in range(len(counts))]
    scale = torch.arange(1.0, len(counts) + 1, dtype=torch.float64)
    trained = train(
        stack,
        FrozenExpert(target, torch.float64),
        stack_tokens(tokens),
        scale,
        steps=24,
        lr=0.01,
        stop=stack_tokens(stops) if stopping else None,
    )
    for at, (x, y) in enumerate(tokens):
        module = reference.module(kind, hidden, rank).double()
        with torch.no_grad():
            for parameter, name in zip(module.parameters(), reference.NAMES[kind], strict=True):
                parameter.copy_(starts[at][name])
        best, steps, loss = reference.train(
            module, target, x, y, float(scale[at]), 24, 0.01, stops[at] if stopping else None
        )
        assert trained.steps[at] == steps
        torch.testing.assert_close(trained.loss[at].item(), loss, rtol=1e-6, atol=1e-9)
        for expected, name in zip(best, reference.NAMES[kind], strict=True):
            torch.testing.assert_close(trained.parameters[name][at], expected, rtol=1e-5, atol=1e-6)


def test_a_pair_that_gets_no_better_keeps_its_best_state_while_others_go_on():
    target, tokens, stops, stack = _case("linear", [30, 30], 6, 8, 1, True)
    x = tokens[0][0]
    tokens[0] = (x, target(x))  # a self pair: the start cannot be bettered
    stops[0] = (stops[0][0], target(stops[0][0]))
    trained = train(
        stack, FrozenExpert(target, torch.float64), stack_tokens(tokens), torch.ones(2, dtype=torch.float64),
        steps=40, lr=0.01, stop=stack_tokens(stops),
    )  # fmt: skip
    assert trained.steps[0] == 0
    assert torch.equal(trained.parameters["weight"][0], torch.eye(6, dtype=torch.float64))
    assert trained.steps[1] == 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_computes_what_its_aligners_do(kind):
    generators = [torch.Generator().manual_seed(at) for at in range(3)]
    x = torch.randn(3, 5, 8)
    stack = start_stack(kind, 8, 2, generators, list(x))
    for at, row in enumerate(stack.forward(x)):
        aligner = unstack(kind, stack.parameters, at, 8, 2)
        torch.testing.assert_close(aligner(x[at]), row)
        if kind not in ("layernorm", "published"):
            torch.testing.assert_close(aligner(x[at]), x[at] @ aligner.matrix.T + aligner.bias)


def test_aligners_start_as_published_or_at_the_identity():
    torch.manual_seed(1)
    published = make_aligner("published", 32)
    torch.manual_seed(1)
    linear = torch.nn.Linear(32, 32)
    assert torch.equal(published.weight, linear.weight)
    assert torch.equal(published.bias, linear.bias)
    x = torch.randn(4, 32)
    for kind in ("linear", "low-rank", "identity"):
        torch.testing.assert_close(make_aligner(kind, 32)(x), x)


@pytest.mark.parametrize("activation", [torch.nn.functional.silu, torch.nn.functional.gelu])
def test_gradients_reach_the_tokens_and_not_the_expert(activation):
    expert = replace(random_expert(6, 5, 0), activation=Gated(activation))
    matrices = [matrix.requires_grad_() for matrix in expert.matrices.values()]
    frozen = FrozenExpert(expert, torch.float32)
    x = torch.randn(4, 6)
    for _ in range(2):  # the second time in memory that was written to
        got = frozen.backward(torch.ones_like(frozen.forward(x)))
    assert all(matrix.grad is None for matrix in matrices)
    leaf = x.clone().requires_grad_()
    expert(leaf).sum().backward()
    torch.testing.assert_close(got, leaf.grad)


def test_swiglu_is_told_from_a_clamped_one():
    expert = random_expert(6, 5, 0)
    clamped = replace(expert, activation=lambda gate, up: torch.nn.functional.silu(gate.clamp(max=7)) * up)
    assert type(hidden_units(expert)) is Swiglu
    assert type(hidden_units(clamped)) is HiddenUnits
    actual = {family: type(hidden_units(moe_layers(build())[-1].experts[0])) for family, build in FAMILIES.items()}
    assert {family for family, kind in actual.items() if kind is HiddenUnits} == {"gpt_oss", "switch_transformers"}
