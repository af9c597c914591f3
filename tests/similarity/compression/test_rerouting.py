import contextlib
from functools import partial
from itertools import cycle, product

import pytest
import torch
from peft import get_peft_model
from tests.pairwise import pairwise
from tests.reference.similarity_compress import mixture, over_capacity
from tests.similarity.compression.planted import TWINS, aligners, logits, same_state, state, table, with_twins
from tests.tiny_moe import FAMILIES, HIDDEN, PATHS, inputs_for

from lamella import MolaConfig
from lamella.backbones.moe import moe_layers, watch_dispatch
from lamella.errors import LamellaError
from lamella.similarity.compression import Route, drop, find_routes, next_choice, reroute

FULL = [("full", 1, "arrival"), ("full", 1, "weight"), ("full", 0, "arrival"), ("full", 99, "weight")]
STATES = [("dropped", None), ("masked", None), ("full", 0)]
WAYS = [("dropped", None, "arrival"), ("masked", None, "arrival"), *FULL]


def first_layer(model):
    return moe_layers(model)[0]


def outputs_of(model, layer, context, inputs):
    """What the layer's router decided and what its experts put out for one batch inside a context."""
    seen, outputs = [], []
    hook = layer.module.register_forward_hook(lambda m, a, o: outputs.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad(), context, watch_dispatch(model, [layer], seen.append):
        model(**inputs)
    hook.remove()
    x = seen[0].x
    with torch.no_grad():
        output = outputs[0].reshape(x.shape) - (0 if layer.shared is None else layer.shared(x))
    return seen[0], output


@pytest.mark.parametrize(("family", "way", "padding"), pairwise(PATHS, WAYS, ("left", "right")))
def test_tokens_without_their_expert_get_its_route(family, way, padding):
    what, capacity, first = way
    model = FAMILIES[family](dtype=torch.float64)
    layer, other = moe_layers(model)[0], moe_layers(model)[-1]
    routes = {(layer.index, 1): Route((other.index, 2), aligners("linear", [((0, 1), (0, 2))])[(0, 1), (0, 2)])}
    routes[layer.index, 2] = Route((layer.index, 0))
    closed = {"what": what, "capacity": capacity, "first": first}
    inputs = inputs_for(model, batch=2, padding=padding)
    dispatch, output = outputs_of(model, layer, reroute(model, list(routes), routes, **closed), inputs)
    tokens = set(range(len(dispatch.x)))
    away = {e: tokens if capacity is None else over_capacity(dispatch, e, capacity, first) for e in (1, 2)}

    def work(token, slot, expert, x):
        if token not in away.get(expert, ()):
            return layer.experts[expert](x)
        route = routes[layer.index, expert]
        target = {one.index: one for one in moe_layers(model)}[route.target[0]].experts[route.target[1]]
        return target(x if route.aligner is None else route.aligner(x))

    with torch.no_grad():
        torch.testing.assert_close(output, mixture(dispatch, work))


@pytest.mark.parametrize(("family", "way"), [*zip(cycle(PATHS), WAYS), ("switch_transformers", WAYS[2])])
def test_dropping_leaves_nothing_in_the_place(family, way):
    what, capacity, first = way
    model = FAMILIES[family](dtype=torch.float64)
    layer = first_layer(model)
    closed = {"what": what, "capacity": capacity, "first": first}
    inputs = inputs_for(model, batch=2)
    dispatch, output = outputs_of(model, layer, drop(model, [(layer.index, 0), (layer.index, 2)], **closed), inputs)
    tokens = set(range(len(dispatch.x)))
    away = {e: tokens if capacity is None else over_capacity(dispatch, e, capacity, first) for e in (0, 2)}

    def work(token, slot, expert, x):
        if token in away.get(expert, ()):
            return None
        weights, chosen = dispatch.routing.weights[token], dispatch.routing.indices[token].tolist()
        left = sum(weight for weight, e in zip(weights, chosen, strict=True) if e not in away)
        return layer.experts[expert](x) * (weights.sum() / left if what == "masked" else 1)

    with torch.no_grad():
        torch.testing.assert_close(output, mixture(dispatch, work))


@pytest.mark.parametrize(("family", "way"), [*((family, FULL[0]) for family in FAMILIES), *zip(cycle(PATHS), WAYS)])
def test_the_next_choice_is_the_routers_own(family, way):
    what, capacity, first = way
    model = FAMILIES[family](dtype=torch.float64)
    layer = first_layer(model)
    inputs = inputs_for(model, batch=2)
    before, plain = outputs_of(model, layer, drop(model, [(layer.index, 0)], "full", capacity=99), inputs)
    _masked, expected = outputs_of(model, layer, layer.mask([0]), inputs)
    closed = {"what": what, "capacity": capacity, "first": first}
    _, output = outputs_of(model, layer, next_choice(model, [(layer.index, 0)], **closed), inputs)
    away = set(range(len(before.x))) if capacity is None else over_capacity(before, 0, capacity, first)
    # where experts have a native capacity, who is turned away changes who has room elsewhere
    if family != "switch_transformers" or capacity is None:
        rows = torch.tensor([token in away for token in range(len(before.x))])[:, None]
        torch.testing.assert_close(output, torch.where(rows, expected, plain), rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(output, plain) == (not away)


@pytest.mark.parametrize(
    ("context", "way", "family"),
    [(*case, family) for case, family in zip(product((reroute, drop, next_choice), STATES), cycle(PATHS))],
)
def test_leaving_restores_the_model_bit_for_bit(family, context, way):
    what, capacity = way
    model = FAMILIES[family]()
    layer = first_layer(model)
    before, plain = state(model), logits(model)
    names = [name for name, module in model.named_modules() if "forward" in vars(module)]
    given = ({(layer.index, 1): Route((layer.index, 0))},) if context is reroute else ()
    with contextlib.suppress(KeyboardInterrupt), context(model, [(layer.index, 1)], *given, what, capacity=capacity):
        assert not torch.equal(logits(model), plain)
        raise KeyboardInterrupt
    assert same_state(model, before)
    assert torch.equal(logits(model), plain)
    assert names == [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(("family", "way"), zip(cycle(PATHS), WAYS))
def test_a_route_to_itself_changes_nothing(family, way):
    what, capacity, first = way
    model = FAMILIES[family](dtype=torch.float64)
    layers = moe_layers(model)
    names = [(layer.index, e) for layer in layers for e in range(layer.num_experts)]
    plain = logits(model)
    with reroute(model, names, {name: Route(name) for name in names}, what, capacity=capacity, first=first):
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-5)


def test_the_way_to_the_twin_changes_nothing_and_is_found():
    model = with_twins()
    first, second = TWINS
    routes = find_routes(table(model), model, [first])
    assert routes[first].target == second
    assert routes[first].aligner is None
    with reroute(model, [first], routes):
        torch.testing.assert_close(logits(model), logits(with_twins()))
    both = find_routes(table(model), model, [first, second])
    assert {route.target for route in both.values()}.isdisjoint(TWINS)


def test_routes_stay_in_the_layer_if_asked():
    model = with_twins(twins=((1, 0), (2, 3)))
    assert find_routes(table(model), model, [(1, 0)])[1, 0].target == (2, 3)
    assert find_routes(table(model), model, [(1, 0)], across_layers=False)[1, 0].target[0] == 1


def test_routes_take_the_aligners_of_their_pairs():
    model = FAMILIES["mixtral"](dtype=torch.float64)
    changed = table(model)
    here = (changed["source_layer"] == 0) & (changed["source_expert"] == 1) & (changed["target_expert"] == 2)
    changed.loc[here & (changed["target_layer"] == 2), "nmse"] = 0.0
    asked = []

    def fit(pairs):
        asked.extend(pairs)
        return aligners("low-rank", pairs)

    routes = find_routes(changed, model, [(0, 1)], aligner=fit)
    assert asked == [((0, 1), (2, 2))]
    assert routes[0, 1].target == (2, 2)
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    layers = {layer.index: layer for layer in moe_layers(model)}
    aligner = aligners("low-rank", asked)[asked[0]]
    torch.testing.assert_close(routes[0, 1].work(layers)(x), layers[2].experts[2](aligner(x)))
    with pytest.raises(LamellaError, match="no aligner from expert 1 of layer 0"):
        find_routes(changed, model, [(0, 1)], aligner=lambda pairs: {})


@pytest.mark.parametrize("kind", ["layernorm", "identity"])
def test_aligners_that_are_not_folded_stand_before_the_target(kind):
    model = FAMILIES["mixtral"](dtype=torch.float64)
    aligner = aligners(kind, [((0, 0), (0, 1))])[(0, 0), (0, 1)]
    layers = {layer.index: layer for layer in moe_layers(model)}
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(Route((0, 1), aligner).work(layers)(x), layers[0].experts[1](aligner(x)))


def test_a_decision_does_not_depend_on_batch_mates_or_padding():
    model = FAMILIES["qwen2_moe"](dtype=torch.float64)
    inputs = inputs_for(model, batch=3, padding="right")
    closed = {"what": "full", "capacity": 1, "first": "weight"}
    names = [(0, 0), (0, 1), (1, 2)]
    routes = {name: Route((2, 3)) for name in names}
    with torch.no_grad(), reroute(model, names, routes, **closed):
        together = model(**inputs).logits
        for row, length in enumerate(inputs["attention_mask"].sum(-1).tolist()):
            alone = model(input_ids=inputs["input_ids"][row : row + 1, :length]).logits
            torch.testing.assert_close(together[row, :length], alone[0])


@pytest.mark.parametrize(
    ("experts", "settings", "match"),
    [
        ([], {}, "No expert is named"),
        ([(0, 9)], {}, "no expert 9 of layer 0"),
        ([(7, 0)], {}, "no expert 0 of layer 7"),
        ([(0, 0), (0, 0)], {}, "named twice"),
        ([(0, 0)], {"what": "asleep"}, "asleep"),
        ([(0, 0)], {"what": "full"}, "capacity="),
        ([(0, 0)], {"capacity": 2}, "capacity="),
        ([(0, 0)], {"what": "full", "capacity": -1}, "not a number of tokens"),
        ([(0, 0)], {"what": "full", "capacity": 1, "first": "beauty"}, "beauty"),
    ],
)
def test_bad_input_is_named(experts, settings, match):
    model = FAMILIES["mixtral"]()
    routes = {name: Route((1, 1)) for name in experts}
    for context in (partial(reroute, routes=routes), drop, next_choice):
        with pytest.raises(LamellaError, match=match), context(model, experts, **settings):
            pass


@pytest.mark.parametrize(("what", "capacity"), [("masked", None), ("full", 1)])
def test_too_few_left_for_a_next_choice(what, capacity):
    model = FAMILIES["mixtral"]()
    with (
        pytest.raises(LamellaError, match="fewer"),
        next_choice(model, [(0, 0), (0, 1), (0, 2)], what, capacity=capacity),
    ):
        pass


def test_routes_that_lead_nowhere_are_named():
    model = FAMILIES["mixtral"]()
    with pytest.raises(LamellaError, match="has no route"), reroute(model, [(0, 0)], {}):
        pass
    with pytest.raises(LamellaError, match="no expert 9"), reroute(model, [(0, 0)], {(0, 0): Route((0, 9))}):
        pass
    with pytest.raises(LamellaError, match="no expert that could replace expert 1 of layer 0"):
        find_routes(table(model), model, [(0, e) for e in (1, 0, 2, 3)], across_layers=False)


def test_an_adapters_experts_are_refused():
    model = get_peft_model(FAMILIES["mixtral"](), MolaConfig(target_modules=["q_proj"], num_experts=2, top_k=1))
    with pytest.raises(LamellaError, match="adapter"), drop(model, [(0, 0)]):
        pass
