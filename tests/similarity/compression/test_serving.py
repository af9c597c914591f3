"""Batches that use few experts of a layer: who is closed, who works instead, and what stays as it was."""

import contextlib

import numpy as np
import pandas as pd
import pytest
import torch
from tests.pairwise import pairwise
from tests.reference.similarity_compress import damage_between, limited, mixture
from tests.similarity.compression.planted import captured, logits, same_state, state
from tests.similarity.compression.test_rerouting import outputs_of
from tests.tiny_moe import FAMILIES, HIDDEN, inputs_for

from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.similarity.compression import damages, drop, find_routes, next_choice, reroute
from lamella.similarity.compression.calibration import LayerSample

BY_INTERFACE = ("qwen2_moe", "gpt_oss", "deepseek_v3")  # k = 2 and 3, biases, shared experts


def names(model):
    return [(layer.index, expert) for layer in moe_layers(model) for expert in range(layer.num_experts)]


def random_damages(model, seed=0):
    """A table of every pair within a layer."""
    generator = np.random.default_rng(seed)
    pairs = [(*a, *b) for a in names(model) for b in names(model) if a[0] == b[0] and a != b]
    table = pd.DataFrame(pairs, columns=["source_layer", "source_expert", "target_layer", "target_expert"])
    return table.assign(damage=generator.uniform(0.1, 2.0, len(table)))


def matrix(table, layer, experts):
    of_layer = table[table["source_layer"] == layer].set_index(["source_expert", "target_expert"])["damage"]
    return [[0.0 if a == b else of_layer[a, b] for b in range(experts)] for a in range(experts)]


@pytest.mark.parametrize(("family", "padding", "limit"), pairwise(BY_INTERFACE, ("left", "right"), (3, 4)))
def test_tokens_go_to_the_open_expert_that_does_them_least_damage(family, padding, limit):
    model = FAMILIES[family](dtype=torch.float64)
    layer, table, inputs = moe_layers(model)[0], random_damages(model), inputs_for(model, batch=4, padding=padding)
    experts = [name for name in names(model) if name != (layer.index, 0)]
    held = reroute(model, experts, what="limited", limit=limit, damage=table)
    dispatch, output = outputs_of(model, layer, held, inputs)
    closable = [expert for of, expert in experts if of == layer.index]
    works = limited(dispatch, matrix(table, layer.index, layer.num_experts), closable, limit)
    assert (limit == layer.num_experts) == all(
        to == dispatch.routing.indices[token, slot] for (token, slot), to in works.items()
    )
    with torch.no_grad():
        expected = mixture(dispatch, lambda token, slot, expert, x: layer.experts[works[token, slot]](x))
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("context", [drop, next_choice])
def test_what_is_closed_is_so_for_dropping_and_the_next_choice(context):
    model = FAMILIES["qwen2_moe"](dtype=torch.float64)
    layer, table, inputs = moe_layers(model)[0], random_damages(model), inputs_for(model, batch=4)
    before, _ = outputs_of(model, layer, drop(model, [(0, 0)], "full", capacity=99), inputs)
    works = limited(before, matrix(table, 0, 4), range(4), 2)
    held = context(model, names(model), "limited", limit=2, damage=table)
    _, output = outputs_of(model, layer, held, inputs)
    if context is drop:

        def work(token, slot, expert, x):
            return layer.experts[expert](x) if works[token, slot] == expert else None

        with torch.no_grad():
            expected = mixture(before, work)
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
        return
    for token, x in enumerate(before.x):  # with two of four open, the router's choices are those two
        opened = {works[other, slot] for other, slot in works if other % before.shape[1] == token % before.shape[1]}
        if len(opened) == 2:
            with layer.mask(set(range(4)) - opened), torch.no_grad():
                again = layer.router(x[None])
                one = sum(
                    w * layer.experts[e](x[None]) for w, e in zip(again.weights[0], again.indices[0], strict=True)
                )
            torch.testing.assert_close(output[token], one[0].to(output), rtol=1e-5, atol=1e-5)


def test_one_forward_of_the_texts_decides_as_decoding_them_does():
    model = FAMILIES["qwen2_moe"](dtype=torch.float64)
    inputs = inputs_for(model, batch=4, padding=None)
    with torch.no_grad(), reroute(model, names(model), what="limited", limit=2, damage=random_damages(model)):
        whole = model(**inputs).logits
        ids, cache = inputs["input_ids"], None
        for at in range(ids.shape[1]):
            given = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = given.past_key_values
            torch.testing.assert_close(given.logits[:, 0], whole[:, at])
    assert not torch.allclose(whole, model(**inputs).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_a_limit_of_all_experts_changes_nothing_and_leaving_restores_the_model(implementation):
    model = FAMILIES["mixtral"](experts_implementation=implementation)
    before, plain, table = state(model), logits(model), random_damages(model)
    with reroute(model, names(model), what="limited", limit=4, damage=table):
        assert torch.equal(logits(model), plain)
    first = [(0, expert) for expert in range(4)]
    with contextlib.suppress(KeyboardInterrupt), reroute(model, first, what="limited", limit=2, damage=table):
        assert not torch.equal(logits(model), plain)
        raise KeyboardInterrupt
    assert torch.equal(logits(model), plain)
    assert same_state(model, before)
    assert model.config._experts_implementation == implementation


def test_damages_are_the_mean_error_by_squared_weight(tmp_path):
    model = FAMILIES["qwen2_moe"](dtype=torch.float64)
    with moe_layers(model)[1].mask([3]):  # never chosen, and so judged on all tokens
        taken = captured(model, tmp_path)
        table = damages(taken, model)
        layer = moe_layers(model)[1]
        sample, found = LayerSample.of(layer, taken), matrix(table, 1, 4)
        with torch.no_grad():
            for source, target in ((0, 1), (2, 0), (3, 0)):
                expected = damage_between(layer, sample.x, sample.share, source, target)
                assert found[source][target] == pytest.approx(expected, rel=1e-4)
    assert len(table) == 3 * 4 * 3
    nearest = min((expert for expert in range(4) if expert != 2), key=lambda expert: found[2][expert])
    assert find_routes(table, model, [(1, 2)], measure="damage")[1, 2].target == (1, nearest)


def test_what_cannot_be_limited_is_named():
    model = FAMILIES["qwen2_moe"]()
    table, all_of_them = random_damages(model), names(model)

    def limiting(message, experts=all_of_them, of=model, **settings):
        given = {"what": "limited", "limit": 2, "damage": table} | settings
        with pytest.raises(LamellaError, match=message), reroute(of, experts, **given):
            pass

    limiting("belong to what=", what="dropped")
    limiting("belong to what=", limit=None)
    limiting("leave routes out", routes={})
    limiting("limit=1: a token of layer 0 gets 2 experts", limit=1)
    limiting("3 of its 4 may not be closed; give 3 or more", experts=[(0, 1)])
    limiting("no damage of expert 1 of layer 0 by expert 3", damage=table[table.index != 5])
    limiting("lacks the column", damage=table.drop(columns="source_layer"))
    limiting("has no column damage", damage=table.rename(columns={"damage": "nmse"}))
    with reroute(model, all_of_them, what="limited", limit=2, damage=table):
        limiting("limited already")
    other = FAMILIES["switch_transformers"]()
    limiting("not run by transformers' interface", experts=names(other), of=other, damage=random_damages(other))


@pytest.mark.parametrize(
    ("context", "closed"),
    [(reroute, "limited"), (drop, "limited"), (next_choice, "limited"), (drop, "full"), (next_choice, "full")],
)
def test_several_sequences_in_a_row_are_refused(context, closed):
    """They are no batch, and what one of them has of an expert would count for all."""
    model = FAMILIES["qwen2_moe"]()
    limit = {"limit": 2, "damage": random_damages(model)} if closed == "limited" else {"capacity": 1}
    ids, apart = torch.arange(3, 11)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    experts = names(model) if closed == "limited" else [(0, 1), (1, 2)]
    with torch.no_grad(), context(model, experts, what=closed, **limit):
        model(input_ids=ids, use_cache=False)
        with pytest.raises(LamellaError, match=r"Several documents are packed into a row.*a row of its own"):
            model(input_ids=ids, position_ids=apart, use_cache=False)
        with pytest.raises(LamellaError, match="Continuous batching packs sequences into a row"):
            model.generate_batch([[3, 4], [5, 6, 7]], max_new_tokens=1)
    model(input_ids=ids, position_ids=apart, use_cache=False)


def test_experts_outside_a_forward_of_their_model_are_not_left_unlimited():
    model = FAMILIES["qwen2_moe"]()
    experts = moe_layers(model)[0].experts_module
    given = torch.randn(2, HIDDEN), torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5)
    limited = reroute(model, names(model), what="limited", limit=2, damage=random_damages(model))
    with torch.no_grad(), limited, pytest.raises(LamellaError, match="outside a forward of their model"):
        experts(*given)
