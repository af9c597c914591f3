import pytest
import torch
from tests.pairwise import pairwise
from tests.reference.similarity_compress import mixture
from tests.similarity.compression.planted import captured, logits, same_state, shuffled, state, texts_of, with_twins
from tests.tiny import llama
from tests.tiny_moe import FAMILIES, HIDDEN, PATHS, build

from lamella.backbones.moe import moe_layers, watch_dispatch
from lamella.errors import LamellaError
from lamella.similarity.compression import CRITERIA, compress
from lamella.similarity.compression.budget import experts_to_go
from lamella.similarity.compression.calibration import LayerSample
from lamella.similarity.compression.compressed import Settings, compress_each, rank_experts
from lamella.similarity.compression.criteria import Criterion, Ranking, find_criterion
from lamella.similarity.compression.distillation import distil_routers
from lamella.similarity.compression.refit import refit, small_gates, whole_output
from lamella.similarity.compression.removal import alike
from lamella.similarity.matching import average

PLAIN = {"refit": False, "weighted": False}


def model_of(family, dtype=torch.float32):
    """A tiny model from which experts can go: DeepSeek-V3's six of three groups are all needed."""
    more = {"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {}
    return build(family, dtype=dtype, **more)


def stored(model):
    """What a checkpoint of it would hold, by storage."""
    return sum({p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}.values())


@pytest.mark.parametrize("family", PATHS)
def test_the_whole_budget_is_the_model_bit_for_bit(family):
    model = FAMILIES[family]()
    same = compress(model, captured(model), 1.0, texts=texts_of(model))
    assert same_state(same.model, state(model))
    assert torch.equal(logits(same.model), logits(model))
    assert same.report.experts_left == same.report.experts
    assert same.report.gone == []


@pytest.mark.parametrize(("family", "name"), pairwise(PATHS, ("reap", "stand-in", "mean", "merge", "ream")))
@torch.no_grad()
def test_every_layer_is_the_sum_over_what_is_left(family, name):
    """Each layer puts out what its experts, their stand-ins, averages or means put out, token by token."""
    model = model_of(family, torch.float64)
    before, taken = state(model), captured(model)
    scope = "layer" if family == "qwen2_moe" else "model"
    small = compress(model, taken, 0.75, criterion=name, scope=scope, **PLAIN)
    assert same_state(model, before)
    assert small.report.experts_left < small.report.experts
    assert small.report.parameters == stored(small.model)
    originals, layers = {layer.index: layer for layer in moe_layers(model)}, moe_layers(small.model)
    rankings = rank_experts(model, taken, name)
    groups = {name: group for group in small.report.groups for name in group}
    outputs, seen = {}, []
    hooks = [
        layer.experts_module.register_forward_hook(lambda m, a, o, i=layer.index: outputs.__setitem__(i, o))
        for layer in layers
    ]
    with watch_dispatch(small.model, layers, seen.append):
        small.model(**texts_of(model)[0])
    for hook in hooks:
        hook.remove()
    for dispatch in seen:
        index = dispatch.layer.index
        names = small.report.kept.get(index, range(originals[index].num_experts))

        def work(token, slot, chosen, x, index=index, names=names):
            expert = names[chosen]
            if (index, expert) not in groups:
                return rankings[index].constants[expert][None].to(x)
            group, whole = groups[index, expert], originals[index]
            if small.report.action != "merge":
                return whole.experts[group[0][1]](x)
            weights = [float(rankings[index].weights[one]) for _, one in group]
            return average([whole.experts[one] for _, one in group], weights, rankings[index].matched)(x)

        expected = mixture(dispatch, work)
        torch.testing.assert_close(outputs[index].view_as(expected), expected)


def test_twins_stand_in_for_each_other_at_no_cost():
    model = with_twins()
    small = compress(model, captured(model), 11 / 12, criterion="stand-in", **PLAIN)
    assert [sorted(group) for group in small.report.groups if len(group) > 1] == [[(1, 0), (1, 3)]]
    torch.testing.assert_close(logits(small.model), logits(model))


@pytest.mark.parametrize("name", ["reconstruction", "reap", "merge"])
def test_an_expert_that_no_token_goes_to_goes_first(name):
    model = FAMILIES["gpt_oss"](dtype=torch.float64)
    layers = moe_layers(model)
    with torch.no_grad():
        layers[1].router_module.bias[0] = layers[2].router_module.bias[1] = -1e4
    small = compress(model, captured(model), 10 / 12, criterion=name, **PLAIN)
    assert small.report.gone == [(1, 0), (2, 1)]
    torch.testing.assert_close(logits(small.model), logits(model))


def test_a_refit_lessens_the_error_and_trusts_the_old_weights():
    model = model_of("qwen2_moe", torch.float64)
    taken = captured(model)
    layer = moe_layers(model)[1]
    sample = LayerSample.of(layer, taken)

    @torch.no_grad()
    def error(left):
        gates = small_gates(sample, left)
        put_out = sum(gates[:, e, None] * left.experts[e](sample.x) for e in range(left.num_experts))
        return float((put_out - whole_output(sample)).square().sum())

    for name in ("reap", "m-smoe", "mean", "aligned"):
        plain, fitted, near = (
            moe_layers(compress(model, taken, 0.75, criterion=name, scope="layer", refit=False).model)[1]
            for _ in range(3)
        )
        refit(sample, fitted)
        refit(sample, near, ridge=1e9)
        assert error(fitted) < 0.9 * error(plain)
        for e in range(plain.num_experts):
            torch.testing.assert_close(near.experts[e].down, plain.experts[e].down, atol=1e-5, rtol=0)
    whole = [expert.down.clone() for expert in layer.experts]
    refit(sample, layer)
    for expert, down in zip(layer.experts, whole, strict=True):  # nothing is missing, so nothing changes
        torch.testing.assert_close(expert.down, down)


def test_a_refit_solves_ridge_regression():
    """One expert alone: the closed form of all its tokens."""
    model = model_of("switch_transformers", torch.float64)
    taken = captured(model)
    layer = moe_layers(model)[0]
    sample = LayerSample.of(layer, taken)
    small = moe_layers(compress(model, taken, 0.25, criterion="reap", scope="layer", refit=False).model)[0]
    (expert,) = small.experts
    before, gates = expert.down.detach().clone(), small_gates(sample, small)
    with torch.no_grad():
        units = expert.hidden(sample.x) * gates
        ridge = (0.1 * units.square().sum(0).mean()).sqrt()
        rows = torch.cat([units, ridge * torch.eye(units.shape[1])])
        wanted = torch.cat([whole_output(sample), ridge * before.T])
        refit(sample, small, ridge=0.1)
    torch.testing.assert_close(expert.down.T, torch.linalg.lstsq(rows, wanted).solution)


def test_distillation_moves_the_routers_alone_and_towards_the_whole_model():
    model = model_of("qwen3_moe")
    taken, texts = captured(model), texts_of(model)
    small = compress(model, taken, 0.5, scope="layer", refit=False).model
    before = state(small)
    small.lm_head.weight.requires_grad_(False)

    @torch.no_grad()
    def divergence():
        taught, learned = (one(**texts[0]).logits.log_softmax(-1) for one in (model, small))
        return float((taught.exp() * (taught - learned)).sum(-1)[texts[0]["attention_mask"].bool()].mean())

    first = divergence()
    distil_routers(small, model, texts, passes=8, lr=0.02)
    assert divergence() < first
    changed = {name for name, tensor in state(small).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith("mlp.gate.weight")}
    assert not small.lm_head.weight.requires_grad
    assert small.model.embed_tokens.weight.requires_grad


def test_routers_learn_unasked_where_every_layer_keeps_as_many_and_there_is_text():
    model = model_of("qwen3_moe")
    taken, texts = captured(model), texts_of(model)
    found = {
        (scope, bool(given), asked): compress(model, taken, 0.75, scope=scope, texts=given, distil=asked)
        for scope, given, asked in (
            ("layer", texts, None),
            ("layer", None, None),
            ("layer", texts, 0),
            ("model", texts, None),
        )
    }
    assert [small.report.distil for small in found.values()] == [1, 0, 0, 0]
    learned, untaught = found["layer", True, None].model, found["layer", True, 0].model
    distil_routers(untaught, model, texts)
    assert same_state(untaught, state(learned))


LAYERS = {0: [0.1, 0.2], 1: [1.0, 5.0], 2: [0.3, 0.4]}


@pytest.mark.parametrize(
    ("gradients", "budget", "gone"),
    [
        (None, 10 / 12, {0: 2, 1: 0, 2: 0}),
        (None, 8 / 12, {0: 2, 1: 0, 2: 2}),
        (None, 7 / 12, {0: 2, 1: 1, 2: 2}),
        ({0: 100.0, 1: 0.1, 2: 1.0}, 10 / 12, {0: 0, 1: 1, 2: 1}),
    ],
)
def test_the_cheapest_experts_of_the_whole_model_go(gradients, budget, gone):
    layers = moe_layers(FAMILIES["mixtral"]())
    rankings = {index: Ranking([0, 1], costs) for index, costs in LAYERS.items()}
    criterion = Criterion("costs", "drop", 2, True, lambda sample, seed: rankings[sample.layer.index])
    assert experts_to_go(layers, rankings, criterion, budget, "model", gradients) == gone
    same = experts_to_go(layers, rankings, criterion, 0.75, "layer", gradients)
    assert same == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize("power", [0, 1, 2])
def test_costs_are_weighted_by_what_they_are_made_of(power):
    layers = moe_layers(FAMILIES["mixtral"]())
    rankings = {index: Ranking([0], [1.0]) for index in range(3)}
    criterion = Criterion("costs", "drop", power, True, lambda sample, seed: rankings[sample.layer.index])
    rankings[2] = Ranking([0], [0.5])
    gone = experts_to_go(layers, rankings, criterion, 11 / 12, "model", {0: 1.0, 1: 0.1, 2: 0.3})
    assert gone == ({0: 0, 1: 0, 2: 1} if power < 2 else {0: 0, 1: 1, 2: 0})


def test_a_router_keeps_as_many_experts_as_it_needs():
    model = FAMILIES["mixtral"]()
    taken, texts = captured(model), texts_of(model)
    assert compress(model, taken, 0.5, criterion="reap", texts=texts).report.experts_left == 6
    with pytest.raises(LamellaError, match=r"at most 6 can go by reap.*budget of 0.5 or more"):
        compress(model, taken, 0.4, criterion="reap", texts=texts)
    with pytest.raises(LamellaError, match=r"keeps 1 of the 4 experts of layer 0, whose router needs 2"):
        compress(model, taken, 0.25, criterion="reap", scope="layer")
    assert compress(model, taken, 0.25, criterion="m-smoe", scope="layer").report.experts_left == 3
    with pytest.raises(LamellaError, match="at most 9 can go by m-smoe"):
        compress(model, taken, 0.2, criterion="m-smoe")


def test_groups_of_the_router_stay_of_one_size():
    model = build("deepseek_v3", n_group=2, topk_group=2, n_routed_experts=8)
    taken, texts = captured(model), texts_of(model)
    with pytest.raises(LamellaError, match=r"has 2 groups of as many experts each; .* keeps 6 or 8, 0.75 or 1"):
        compress(model, taken, 7 / 8, scope="layer")
    for scope in ("layer", "model"):
        report = compress(model, taken, 0.75, scope=scope, texts=texts).report
        for layer in moe_layers(model):
            kept = report.kept[layer.index]
            assert sum(one < 4 for one in kept) * 2 == len(kept)


@pytest.mark.parametrize("budget", [0, -0.5, 1.01, float("nan")])
def test_a_budget_outside_0_to_1_is_refused(budget):
    with pytest.raises(LamellaError, match="budget"):
        compress(FAMILIES["mixtral"](), None, budget)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"criterion": "beauty"}, "criterion='beauty' is not one of .*reconstruction, energy"),
        ({"scope": "block"}, "scope='block' is not one of layer, model"),
        ({}, "reads text beside the capture; give texts="),
        ({"criterion": "reap", "scope": "layer", "distil": 1}, "distil=1 reads text"),
    ],
)
def test_bad_input_is_named_before_anything_is_computed(settings, match):
    with pytest.raises(LamellaError, match=match):
        compress(FAMILIES["mixtral"](), None, 0.5, **settings)


def test_every_budget_is_checked_before_the_first_model():
    model = FAMILIES["mixtral"]()
    with pytest.raises(LamellaError, match="can go"):
        next(compress_each(model, captured(model), [0.5, 0.01], Settings("random", **PLAIN)))


def test_models_without_experts_of_their_own_are_refused(tmp_path):
    model = FAMILIES["mixtral"]()
    taken = captured(model)
    with pytest.raises(LamellaError, match="mixture of experts"):
        compress(llama(), taken, 0.5, scope="layer")
    pooled = compress(model, taken, 0.5, criterion="m-smoe", scope="layer").model
    with pytest.raises(LamellaError, match="compressed already"):
        compress(pooled, taken, 0.5, scope="layer")
    with pytest.raises(LamellaError, match="is of the model"):
        compress(FAMILIES["mixtral"](seed=1), taken, 0.5, scope="layer")
    moe_layers(model)[0].experts_module.register_parameter("lora", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(LamellaError, match="not all that their module holds"):
        compress(model, taken, 0.5, scope="layer")


def test_a_router_that_decides_by_more_than_its_rows_is_not_cut():
    model = FAMILIES["mixtral"]()
    gate = moe_layers(model)[0].router_module
    gate.favourites = torch.arange(4.0)  # no parameter and no buffer
    forward = gate.forward

    def biased(x):
        logits, weights, indices = forward(x)
        return logits, weights, (indices + int(gate.favourites[-1])) % 2

    gate.forward = biased
    with pytest.raises(LamellaError, match="so it cannot be cut; choose a criterion that replaces or merges"):
        compress(model, captured(model), 0.5, criterion="reap", scope="layer")


def test_near_ties_of_a_router_in_16_bits_do_not_keep_it_from_being_cut():
    """Which of two nearly equal experts a token gets may turn with the number of rows of the product."""
    masked = torch.eye(8, dtype=torch.float64).repeat(8, 1)
    cut = masked.clone()
    cut[:2] = cut[:2].flip(1)
    assert alike(masked, cut, torch.finfo(torch.bfloat16).eps)
    assert not alike(masked, cut, torch.finfo(torch.float32).eps)
    assert not alike(masked, cut.roll(1, 1), torch.finfo(torch.bfloat16).eps)


def test_a_compressed_model_still_learns():
    model = FAMILIES["qwen2_moe"]()
    for name in ("reap", "m-smoe"):
        small = compress(model, captured(model), 0.5, criterion=name, scope="layer").model
        inputs = texts_of(model)[0]
        small(**inputs, labels=inputs["input_ids"]).loss.backward()
        parameters = [p for layer in moe_layers(small) for p in layer.experts_module.parameters()]
        assert all(p.grad is not None and p.grad.any() for p in parameters)


def test_random_experts_differ_by_seed_and_repeat():
    model = FAMILIES["mixtral"]()
    taken = captured(model)
    gone = [compress(model, taken, 0.5, criterion="random", scope="layer", seed=seed).report.gone for seed in (0, 0, 1)]
    assert gone[0] == gone[1] != gone[2]


def test_each_criterion_says_what_it_computes():
    for name in CRITERIA:
        assert len(find_criterion(name).source) > 20


def test_the_mean_of_an_expert_and_itself_in_another_order_is_itself():
    expert = moe_layers(FAMILIES["gpt_oss"]())[0].experts[0]
    mean = average([expert, shuffled(expert)], [0.0, 0.0])
    for name, matrix in mean.matrices.items():
        torch.testing.assert_close(matrix, expert.matrices[name])
    x = torch.randn(3, HIDDEN)
    torch.testing.assert_close(mean(x), expert(x))
