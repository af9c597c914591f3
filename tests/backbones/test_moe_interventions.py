"""Replacing and masking experts: what changes, what does not, and that leaving restores everything bit for bit."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import tiny_moe
from torch import Tensor, nn

from lamella import LamellaError, moe_layers, record_routing
from lamella.backbones.moe import MoELayer
from lamella.backbones.moe.interventions import put

FAMILIES = sorted(tiny_moe.FAMILIES)
every_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**tiny_moe.inputs_for(model)).logits


def state_of_modules(model: nn.Module) -> list[set[str]]:
    return [set(vars(module)) | set(module._forward_hooks) for module in model.modules()]


@every_family
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_an_expert_in_its_own_place_changes_nothing(family, implementation):
    model = tiny_moe.FAMILIES[family](experts_implementation=implementation)
    before = logits(model)
    for layer in moe_layers(model):
        with layer.replace({e: layer.experts[e] for e in range(layer.num_experts)}):
            torch.testing.assert_close(logits(model), before)


@every_family
def test_another_expert_changes_the_logits_and_leaving_restores_them(family):
    model = tiny_moe.FAMILIES[family]()
    before, modules = logits(model), state_of_modules(model)
    first, second = moe_layers(model)[:2]
    with first.replace(dict(enumerate(second.experts))):
        assert not torch.allclose(logits(model), before, atol=1e-4)
    assert torch.equal(logits(model), before)
    assert state_of_modules(model) == modules


@every_family
def test_a_replaced_expert_is_as_if_it_had_been_written(family):
    model = tiny_moe.FAMILIES[family]()
    first, *_, last = moe_layers(model)
    with last.replace({1: first.experts[2]}):
        replaced = logits(model)
    last.experts[1].write(first.experts[2])
    torch.testing.assert_close(replaced, logits(model))


@every_family
def test_an_error_inside_restores_too(family):
    model = tiny_moe.FAMILIES[family]()
    before, modules = logits(model), state_of_modules(model)
    layer = moe_layers(model)[0]

    def fails(x: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError), layer.mask([0]), layer.replace(dict.fromkeys(range(layer.num_experts), fails)):
        logits(model)
    assert torch.equal(logits(model), before)
    assert state_of_modules(model) == modules


@every_family
def test_of_nested_replacements_the_inner_one_counts_and_the_outer_one_comes_back(family):
    model = tiny_moe.FAMILIES[family]()
    layer, other = moe_layers(model)[:2]
    with layer.replace({0: other.experts[0]}):
        outer = logits(model)
        with layer.replace({0: other.experts[1], 1: other.experts[2]}):
            both = logits(model)
        assert torch.equal(logits(model), outer)
    with layer.replace({0: other.experts[1], 1: other.experts[2]}):
        torch.testing.assert_close(logits(model), both)


def intervened(family: str, layer: MoELayer, x: Tensor, masked: list[int]) -> tuple[Tensor, Tensor]:
    """Indices and weights of the router with the masked experts' logits at -inf, written anew for each family."""
    router: Any = layer.router_module
    weight = router.classifier.weight if hasattr(router, "classifier") else router.weight
    z = x @ weight.t() + (router.bias if getattr(router, "bias", None) is not None else 0)
    z[:, masked] = -torch.inf
    rows = [_choose(family, router, row, layer.top_k) for row in z]
    return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


SOFTMAX = ("qwen2_moe", "qwen3_moe", "olmoe", "switch_transformers")


def _choose(family: str, router: Any, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if family in ("mixtral", "granitemoe", "gpt_oss") or (
        getattr(router, "norm_topk_prob", False) and family in SOFTMAX
    ):
        order = z.argsort(descending=True)[:k]
        return order, torch.softmax(z[order], dim=0)
    if family in SOFTMAX:
        order = z.argsort(descending=True)[:k]
        return order, torch.softmax(z, dim=0)[order]
    if family == "phimoe":
        return _sparse_mixer(z, router.router_jitter_noise)
    scores = torch.softmax(z, dim=0) if family == "deepseek_v2" else z.sigmoid()
    rank = scores.clone() if family == "deepseek_v2" else scores + router.e_score_correction_bias
    rank[z.isneginf()] = -torch.inf
    groups = rank.view(router.num_group, -1)
    of_groups = groups.max(dim=1).values if family == "deepseek_v2" else groups.sum(dim=1)  # two experts in a group
    inside = of_groups.argsort(descending=True)[: router.topk_group].tolist()
    size = len(z) // router.num_group
    order = sorted(range(len(z)), key=lambda e: (rank[e] > -torch.inf, e // size in inside, float(rank[e])))[::-1][:k]
    weights = scores[order]
    if family == "deepseek_v3":
        weights = weights / weights.sum()
    return torch.tensor(order), weights * router.routed_scaling_factor


def _sparse_mixer(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    indices, weights = [], []
    left = z.clone()
    for _ in range(2):
        best = int(left.argmax())
        near = [e for e in range(len(z)) if left[e] > -torch.inf]
        near = [e for e in near if (left[best] - z[e]) / max(z[e].abs(), left[best]) <= 2 * eps]
        indices.append(best)
        weights.append(torch.softmax(z[near], dim=0)[near.index(best)])
        left[best] = -torch.inf
    return torch.tensor(indices), torch.stack(weights)


@every_family
@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@torch.no_grad()
def test_a_mask_is_the_router_with_those_logits_at_minus_infinity(family, data):
    config = {"norm_topk_prob": data.draw(st.booleans())} if family in ("qwen2_moe", "qwen3_moe", "olmoe") else {}
    layer = moe_layers(tiny_moe.build(family, seed=data.draw(st.integers(0, 5)), expert_capacity=99, **config))[-1]
    masked = data.draw(st.sets(st.integers(0, layer.num_experts - 1), max_size=layer.num_experts - layer.top_k))
    x = torch.randn(6, tiny_moe.HIDDEN)
    indices, weights = intervened(family, layer, x, sorted(masked))
    with layer.mask(masked):
        routing = layer.router(x)
    assert not set(routing.indices.flatten().tolist()) & masked
    dense = torch.zeros(6, layer.num_experts).scatter(1, indices, weights.float())
    assert (routing.dense_weights() > 0).equal(dense > 0)
    torch.testing.assert_close(routing.dense_weights(), dense)


@every_family
@torch.no_grad()
def test_masking_nothing_is_the_router_itself(family):
    layer = moe_layers(tiny_moe.FAMILIES[family](dtype=torch.bfloat16))[0]
    x = torch.randn(2, 6, tiny_moe.HIDDEN, dtype=torch.bfloat16)
    given = x if family == "switch_transformers" else x.flatten(0, 1)
    plain = layer.router_module(given)
    with layer.mask([]):
        again = layer.router_module(given)
    assert [part.dtype for part in again] == [part.dtype for part in plain]
    assert all(map(torch.equal, plain, again))


@every_family
def test_a_masked_expert_gets_no_token_in_the_model_and_leaving_restores(family):
    model = tiny_moe.FAMILIES[family]()
    before, modules = logits(model), state_of_modules(model)
    layer = moe_layers(model)[0]
    with layer.mask([0]):
        masked = logits(model)
        poisoned = {0: lambda x: x * torch.nan}
        with layer.replace(poisoned):
            assert torch.equal(logits(model), masked), "nobody asks expert 0"
    assert not torch.equal(masked, before)
    assert torch.equal(logits(model), before)
    assert state_of_modules(model) == modules


@every_family
@torch.no_grad()
def test_nested_masks_add_up(family):
    model = tiny_moe.FAMILIES[family]()
    layer = moe_layers(model)[0]
    x = torch.randn(9, tiny_moe.HIDDEN)
    with layer.mask([0, 1]):
        both = layer.router(x)
    with layer.mask([0]):
        one = layer.router(x)
        with layer.mask([1]):
            nested = layer.router(x)
        assert torch.equal(layer.router(x).indices, one.indices)
    with layer.mask([0]), record_routing(model), layer.mask([1]):  # what watches the router stands between them
        watched = layer.router(x)
    for routing in (nested, watched):
        assert torch.equal(routing.indices, both.indices)
        assert torch.equal(routing.weights, both.weights)


@every_family
def test_too_many_masked_is_an_error_also_over_nested_contexts(family):
    layer = moe_layers(tiny_moe.FAMILIES[family]())[0]
    most = layer.num_experts - layer.top_k
    with pytest.raises(LamellaError, match="mask fewer"), layer.mask(range(most + 1)):
        pass
    with layer.mask(range(most)), pytest.raises(LamellaError, match="mask fewer"), layer.mask([most]):
        pass
    with pytest.raises(LamellaError, match="has the experts 0 to"), layer.mask([layer.num_experts]):
        pass
    with pytest.raises(LamellaError, match="has the experts 0 to"), layer.replace({-1: layer.experts[0]}):
        pass


@every_family
def test_a_masked_model_trains(family):
    model = tiny_moe.FAMILIES[family]().train()
    given = tiny_moe.inputs_for(model)
    layer = moe_layers(model)[0]
    with layer.mask([0]):
        model(**{"labels": given["input_ids"], **given}).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert layer.router_module.get_parameter(_weight_name(layer)).grad.abs().sum() > 0
    for matrix in layer.experts_module.parameters():
        if matrix.dim() == 3:  # fused; in Switch each expert has its own
            assert matrix.grad[0].abs().sum() == 0


def _weight_name(layer: MoELayer) -> str:
    return "classifier.weight" if hasattr(layer.router_module, "classifier") else "weight"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_replacements_train_under_checkpointing(use_reentrant):
    model = tiny_moe.FAMILIES["qwen2_moe"]().train()
    model.enable_input_require_grads()
    given = {**tiny_moe.inputs(), "labels": tiny_moe.inputs()["input_ids"]}
    layer = moe_layers(model)[1]
    replacement = nn.Linear(tiny_moe.HIDDEN, tiny_moe.HIDDEN)

    def gradient() -> Tensor:
        replacement.zero_grad()
        with layer.mask([0]), layer.replace({1: replacement}):
            model(**given).loss.backward()
        return replacement.weight.grad.clone()

    plain = gradient()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    torch.testing.assert_close(gradient(), plain)
    assert plain.abs().sum() > 0


def test_put_leaves_what_an_outer_context_put_there():
    module = nn.Linear(2, 2)
    with put(module, "forward", lambda original: lambda x: original(x) + 1):
        outer = module.forward
        with put(module, "forward", lambda original: lambda x: original(x) * 2):
            assert module.forward is not outer
        assert module.forward is outer
    assert "forward" not in vars(module)
