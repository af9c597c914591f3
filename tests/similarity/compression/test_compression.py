from functools import partial

import pandas as pd
import pytest
import torch
from tests.pairwise import pairwise
from tests.reference.similarity_compress import mixture
from tests.similarity.compression.planted import TWINS, Counts, logits, same_state, shuffled, state, table, with_twins
from tests.tiny import llama
from tests.tiny_moe import FAMILIES, HIDDEN, PATHS, inputs_for

from lamella.backbones.moe import moe_layers, watch_dispatch
from lamella.errors import LamellaError
from lamella.similarity.activations import capture
from lamella.similarity.alignment import align, make_aligner
from lamella.similarity.compression import METHODS, compress
from lamella.similarity.compression.grouping import Settings
from lamella.similarity.compression.merging import compress_each
from lamella.similarity.compression.pool import PooledExperts
from lamella.similarity.matching import average, match_units

ONE_LESS = 11 / 12  # of three layers with four experts each


def aligners(kind, pairs, rank=2):
    made = {}
    for pair in pairs:
        made[pair] = make_aligner(kind, HIDDEN, rank).double()
        for at, parameter in enumerate(made[pair].parameters()):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(at + 7 * pair[0][1]))
    return made


def stored(model):
    """What a checkpoint of it would hold, by storage."""
    return sum({p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}.values())


@pytest.mark.parametrize(("family", "method"), zip(PATHS, METHODS, strict=True))
def test_the_whole_budget_is_the_model_bit_for_bit(family, method):
    model = FAMILIES[family]()
    same = compress(model, table(model), 1.0, method=method, capture=Counts(model))
    assert same_state(same.model, state(model))
    assert torch.equal(logits(same.model), logits(model))
    assert same.report.kept == 1
    assert same.report.experts_left == same.report.experts


@pytest.mark.parametrize(("family", "merge"), pairwise(PATHS, (True, False)))
def test_twins_come_together_first_and_change_nothing(family, merge):
    layer = moe_layers(FAMILIES[family]())[0].index
    twins = ((layer, 0), (layer, 3))
    model = with_twins(family, twins)
    before, expected = state(model), logits(model)
    budget = 1 - 1 / sum(one.num_experts for one in moe_layers(model))
    for method in ("similarity", "weight-distance"):
        small = compress(model, table(model), budget, method=method, merge=merge)
        assert [sorted(group) for group in small.report.groups if len(group) > 1] == [list(twins)]
        # some families compute their routers in float32
        torch.testing.assert_close(logits(small.model), expected, rtol=1e-4, atol=1e-5)
    assert same_state(model, before)
    assert torch.equal(logits(model), expected)


def test_random_and_usage_do_not_see_the_twins():
    model = with_twins()
    for method in ("random", "usage"):
        small = compress(model, None, ONE_LESS, method=method, capture=Counts(model))
        assert [sorted(group) for group in small.report.groups if len(group) > 1] != [list(TWINS)]
        assert (logits(small.model) - logits(model)).abs().max() > 1e-3


def test_twins_in_neighbouring_layers_come_together_when_they_may():
    twins = ((1, 2), (2, 1))
    model = with_twins(twins=twins)
    small = compress(model, table(model), ONE_LESS, across_layers=True)
    assert [sorted(group) for group in small.report.groups if len(group) > 1] == [list(twins)]
    torch.testing.assert_close(logits(small.model), logits(model))
    assert small.report.parameters == stored(small.model)
    apart = compress(model, table(model), ONE_LESS, across_layers=False)
    assert [sorted(group) for group in apart.report.groups if len(group) > 1] != [list(twins)]
    beyond = with_twins(twins=((0, 2), (2, 1)))
    beyond_report = compress(beyond, table(beyond), ONE_LESS, across_layers=True).report
    assert ((0, 2), (2, 1)) not in [tuple(sorted(group)) for group in beyond_report.groups]


@pytest.mark.parametrize(("family", "across"), pairwise(PATHS, (False, True)))
def test_every_layer_is_the_sum_over_what_stands_for_the_chosen(family, across):
    model = FAMILIES[family](dtype=torch.float64)
    small = compress(model, None, 0.5, method="random", across_layers=across, merge=False)
    place = {(row.layer, row.expert): (row.by_layer, row.by_expert) for row in small.report.frame.itertuples()}
    layers, originals = moe_layers(small.model), {layer.index: layer for layer in moe_layers(model)}
    seen, outputs = [], {}
    hooks = [
        layer.experts_module.register_forward_hook(lambda m, a, o, i=layer.index: outputs.__setitem__(i, o))
        for layer in layers
    ]
    with torch.no_grad(), watch_dispatch(small.model, layers, seen.append):
        small.model(**inputs_for(model))
        for dispatch in seen:
            index = dispatch.layer.index

            def work(token, slot, expert, x, index=index):
                layer, other = place[index, expert]
                return originals[layer].experts[other](x)

            expected = mixture(dispatch, work)
            torch.testing.assert_close(outputs[index].view_as(expected), expected)
    assert len(seen) == len(layers)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("method", "budget", "across"), pairwise(METHODS, (0.75, 0.5, 0.3), (False, True)))
def test_the_parameters_that_are_counted_are_stored(method, budget, across):
    model = FAMILIES["qwen2_moe"]()
    report = (
        small := compress(model, table(model), budget, method=method, across_layers=across, capture=Counts(model))
    ).report
    assert report.parameters == stored(small.model)
    assert report.parameters_before == stored(model)
    assert report.parameters_before - report.parameters == report.expert_parameters_before - report.expert_parameters
    assert budget - 1 / 12 < report.kept <= budget
    assert report.experts_left == len(report.groups) == round(report.kept * 12)
    assert sorted(key for group in report.groups for key in group) == [(le, e) for le in range(3) for e in range(4)]
    assert f"{report.experts_left} by {method}" in str(report)


def test_a_group_is_the_usage_weighted_mean_of_matched_experts():
    model = FAMILIES["mixtral"](dtype=torch.float64)
    counts = Counts(model)
    small = compress(model, table(model), 0.5, capture=counts)
    layers = {layer.index: layer for layer in moe_layers(model)}
    (group,) = [one for one in small.report.groups if len(one) == max(map(len, small.report.groups))][:1]
    experts = [layers[layer].experts[e] for layer, e in group]
    total = sum(counts.shares[key] for key in group)
    expected = sum(
        counts.shares[key] / total * expert.up[match_units(experts[0], expert)]
        for key, expert in zip(group, experts, strict=True)
    )
    pool = {layer.index: layer for layer in moe_layers(small.model)}[group[0][0]].experts_module
    torch.testing.assert_close(pool.expert(group[0][1]).up, expected)
    assert small.report.weighted_by_usage


@pytest.fixture(scope="module")
def silenced(tmp_path_factory):
    """A model with two experts that never fire, its capture, and what `align` writes of it: no rows from them."""
    model = FAMILIES["mixtral"]()
    layers = moe_layers(model)
    texts = [inputs_for(model, batch=8, tokens=14, padding=None, seed=seed) for seed in range(8)]
    with layers[1].mask([0]), layers[2].mask([1]):
        counted = capture(model, texts, tmp_path_factory.mktemp("silenced") / "capture", per_expert=200)
    return model, counted, align(counted, model, aligner="identity", controls=False)


@pytest.mark.parametrize("method", ["similarity", "weight-distance", "usage"])
@pytest.mark.parametrize("merge", [True, False])
def test_what_no_token_goes_to_goes_first_and_stands_for_nobody(silenced, method, merge):
    model, counted, aligned = silenced
    assert not {(1, 0), (2, 1)} & set(zip(aligned["source_layer"], aligned["source_expert"], strict=True))
    small = compress(model, aligned, 10 / 12, method=method, merge=merge, capture=counted)
    groups = [group for group in small.report.groups if len(group) > 1]
    assert sorted(group[1] for group in groups) == [(1, 0), (2, 1)]
    assert all(layer == group[1][0] for group in groups for layer, _ in group)
    assert small.report.weighted_by_usage
    layers, pools = moe_layers(model), moe_layers(small.model)
    with torch.no_grad():
        for (layer, expert), (_, unused) in groups:  # the one that stays is as it was
            x, before = torch.randn(3, HIDDEN), layers[layer].experts[expert]
            torch.testing.assert_close(pools[layer].experts_module.expert(unused)(x), before(x))


def test_an_expert_without_tokens_is_given_no_aligner(silenced):
    model, counted, aligned = silenced
    asked = []

    def train(pairs):
        asked.extend(pairs)
        return aligners("low-rank", pairs)

    report = compress(model, aligned, 0.75, merge=False, aligner=train, capture=counted).report
    assert asked
    assert not {(1, 0), (2, 1)} & {source for source, _ in asked}
    assert report.kept <= 0.75


def test_every_budget_is_checked_before_the_first_model():
    model = FAMILIES["mixtral"](intermediate_size=4)
    with pytest.raises(LamellaError, match="cannot be reached"):
        next(compress_each(model, None, [0.5, 0.01], Settings(method="random")))


def test_the_mean_of_an_expert_and_itself_in_another_order_is_itself():
    expert = moe_layers(FAMILIES["gpt_oss"]())[0].experts[0]
    mean = average([expert, shuffled(expert)], [0.0, 0.0])
    for name, matrix in mean.matrices.items():
        torch.testing.assert_close(matrix, expert.matrices[name])


@pytest.mark.parametrize(
    ("kind", "ff"),
    [("linear", 2), ("linear", 12), ("low-rank", 2), ("low-rank", 12), ("layernorm", 12), ("identity", 12)],
)
def test_replacements_are_their_targets_behind_aligners(kind, ff):
    model = with_twins("mixtral") if ff == 12 else FAMILIES["mixtral"](dtype=torch.float64, intermediate_size=ff)
    small = compress(model, table(model), 0.9, merge=False, aligner=partial(aligners, kind))
    layers = {layer.index: layer for layer in moe_layers(model)}
    x = torch.randn(5, HIDDEN, dtype=torch.float64)
    pairs = [(source, group[0]) for group in small.report.groups for source in group[1:]]
    assert pairs
    for (source, target), aligner in aligners(kind, pairs).items():
        pool = {layer.index: layer for layer in moe_layers(small.model)}[source[0]].experts_module
        expected = layers[target[0]].experts[target[1]](aligner(x))
        torch.testing.assert_close(pool.stored[int(pool.places[source[1]])](x), expected)
        if kind != "layernorm":
            torch.testing.assert_close(pool.expert(source[1])(x), expected)
    assert small.report.parameters == stored(small.model)
    assert small.report.kept <= 0.9
    whole = layers[0].experts[0].parameters
    folded, own = 2 * (ff * HIDDEN + ff), sum(p.numel() for p in make_aligner(kind, HIDDEN, 2).parameters())
    extra = own if kind in ("layernorm", "identity") else min(own, folded)
    assert small.report.expert_parameters == (12 - len(pairs)) * whole + len(pairs) * extra


def test_a_compressed_model_still_learns():
    model = FAMILIES["qwen2_moe"]()
    small = compress(model, None, 0.5, method="random", across_layers=True).model
    inputs = inputs_for(model)
    small(**inputs, labels=inputs["input_ids"]).loss.backward()
    pools = [module for module in small.modules() if isinstance(module, PooledExperts)]
    assert pools
    assert all(p.grad is not None and p.grad.any() for pool in pools for p in pool.parameters())


def test_seeds_of_the_random_method_differ_and_repeat():
    model = FAMILIES["mixtral"]()
    groups = [compress(model, None, 0.5, method="random", seed=seed).report.groups for seed in (0, 0, 1)]
    assert groups[0] == groups[1] != groups[2]


def test_the_measure_of_the_table_decides():
    model = FAMILIES["mixtral"]()
    screen = table(model)[["source_layer", "source_expert", "target_layer", "target_expert"]].copy()
    far = screen.assign(cka_distance=1.0, floor=1.0, weight_distance=1.0)
    for name, pair in {"cka_distance": (0, 1), "floor": (1, 2), "weight_distance": (2, 3)}.items():
        here = (far["source_layer"] == 2) & (far["target_layer"] == 2)
        here &= far["source_expert"].isin(pair) & far["target_expert"].isin(pair)
        far.loc[here, name] = 0.1
    together = {
        name: [sorted(group) for group in compress(model, far, ONE_LESS, measure=name).report.groups if len(group) > 1]
        for name in ("floor", "weight_distance")
    }
    default = compress(model, far, ONE_LESS).report
    assert default.measure == "cka_distance"
    assert [sorted(group) for group in default.groups if len(group) > 1] == [[(2, 0), (2, 1)]]
    assert together == {"floor": [[(2, 1), (2, 2)]], "weight_distance": [[(2, 2), (2, 3)]]}
    by_weights = compress(model, far, ONE_LESS, method="weight-distance").report
    assert [sorted(group) for group in by_weights.groups if len(group) > 1] == [[(2, 2), (2, 3)]]


@pytest.mark.parametrize("budget", [0, -0.5, 1.01, float("nan")])
def test_a_budget_outside_0_to_1_is_refused(budget):
    model = FAMILIES["mixtral"]()
    with pytest.raises(LamellaError, match="budget"):
        compress(model, None, budget, method="random")


def test_a_budget_below_one_expert_a_layer_is_refused():
    model = FAMILIES["mixtral"]()
    assert compress(model, None, 0.25, method="random").report.experts_left == 3
    with pytest.raises(LamellaError, match="cannot be reached"):
        compress(model, None, 0.24, method="random")


def bad(frame, **columns):
    changed = frame.copy()
    for name, value in columns.items():
        changed[name] = changed[name].astype(type(value))
        changed.loc[changed.index[0], name] = value
    return changed


@pytest.mark.parametrize(
    ("change", "settings", "match"),
    [
        (lambda t: bad(t, identity_nmse=float("nan")), {}, "NaN"),
        (lambda t: bad(t, source_layer=7), {}, "layer 7, which this model does not have"),
        (lambda t: bad(t, target_expert=9), {}, "expert 9"),
        (lambda t: t.drop(columns="source_layer"), {}, "lacks the column source_layer"),
        (lambda t: t, {"measure": "beauty"}, "no column beauty"),
        (lambda t: t.iloc[:0], {}, "no finite"),
        (lambda t: pd.concat([t, t.assign(aligner="low-rank")]), {"measure": "nmse"}, "several aligners"),
        (lambda t: None, {}, "give it as similarity"),
        (lambda t: t, {"method": "usage"}, "give capture="),
        (lambda t: t, {"method": "beauty"}, "not one of similarity"),
        (lambda t: t, {"aligner": partial(aligners, "linear")}, "merge=False"),
        (lambda t: t, {"aligner": lambda pairs: {}, "merge": False}, "no aligner from"),
        (lambda t: t, {"aligner": partial(aligners, "linear"), "merge": False, "budget": 0.3}, "cannot be reached"),
    ],
)
def test_bad_input_is_named(change, settings, match):
    model = FAMILIES["mixtral"](intermediate_size=4)
    with pytest.raises(LamellaError, match=match):
        compress(model, change(table(model)), **{"budget": 0.5, **settings})


def test_models_without_experts_of_their_own_are_refused():
    with pytest.raises(LamellaError, match="mixture of experts"):
        compress(llama(), None, 0.5, method="random")
    model = FAMILIES["mixtral"]()
    with pytest.raises(LamellaError, match="compressed already"):
        compress(compress(model, None, 0.5, method="random").model, None, 0.5, method="random")
    moe_layers(model)[0].experts_module.register_parameter("lora", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(LamellaError, match="not all that their module holds"):
        compress(model, None, 0.5, method="random")
