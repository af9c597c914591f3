"""Each criterion against its slow version, on all tokens of a text."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import tiny_moe
from tests.reference import similarity_criteria as slow
from tests.reference.similarity_compress import average_linkage

from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.similarity import capture
from lamella.similarity.compression import Compressed, compress, fold
from lamella.similarity.compression.calibration import LayerSample, layer_gradients
from lamella.similarity.compression.criteria import CRITERIA, find_criterion
from lamella.similarity.compression.criteria.replacing import replacement_damage
from lamella.similarity.matching import average

BATCHES = [tiny_moe.inputs(batch=4, tokens=9, seed=seed) for seed in (3, 4, 5)]
EXPERTS = 4


class Text:
    """A tiny model, one of its layers, the tokens of a text there, and a capture of all of them."""

    def __init__(self, name, folder):
        self.model = tiny_moe.build(name, dtype=torch.float64)
        self.layers = moe_layers(self.model)
        self.layer = self.layers[1]
        taken = capture(self.model, BATCHES, folder, per_expert=200)
        self.sample = LayerSample.of(self.layer, taken)
        self.tokens, self.logits = slow.tokens_of(self.model, self.layer, BATCHES)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Text("qwen2_moe", tmp_path_factory.mktemp("capture") / "qwen")


@pytest.mark.parametrize("name", ["frequency", "energy", "reap", "ean", "man", "aimer", "mone", "mean"])
@torch.no_grad()
def test_scores(name, text):
    ranking = find_criterion(name).rank(text.sample, 0)
    function = slow.mean_damage if name == "mean" else getattr(slow, name)
    scores = [function(text.layer, text.tokens, expert) for expert in range(EXPERTS)]
    assert list(ranking.order) == sorted(range(EXPERTS), key=scores.__getitem__)[: len(ranking.order)]
    # inputs were kept in float32
    assert ranking.costs == pytest.approx([scores[one] for one in ranking.order], rel=1e-5)
    if ranking.constants is not None:
        means = [slow.mean_output(text.layer, text.tokens, expert) for expert in range(EXPERTS)]
        assert torch.allclose(ranking.constants, torch.stack(means), atol=1e-6)


@torch.no_grad()
def test_reconstruction_is_the_error_that_the_layer_makes(text):
    ranking = find_criterion("reconstruction").rank(text.sample, 0)
    order, costs = slow.greedy(EXPERTS, lambda gone: slow.reconstruction_total(text.layer, text.tokens, gone), 2)
    assert list(ranking.order) == order
    assert ranking.costs == pytest.approx(costs, rel=1e-5)


@torch.no_grad()
def test_stand_in_is_the_nearest_expert_that_is_left(text):
    ranking = find_criterion("stand-in").rank(text.sample, 0)
    kept = lambda gone: [one for one in range(EXPERTS) if one not in gone]  # noqa: E731
    order, costs = slow.greedy(EXPERTS, lambda gone: slow.stand_in_total(text.layer, text.tokens, kept(gone)), 1)
    assert list(ranking.order) == order
    assert ranking.costs == pytest.approx(costs, rel=1e-5)
    damage = replacement_damage(text.sample)
    for count in range(1, EXPERTS):
        for group in ranking.groups(count):
            for gone in group[1:]:
                assert damage[gone, group[0]] == damage[gone, kept(order[:count])].min()


@torch.no_grad()
def test_an_aligner_regains_an_expert_that_is_another_behind_one(tmp_path):
    model = tiny_moe.build("qwen2_moe", dtype=torch.float64)
    layer = moe_layers(model)[1]
    first, hidden = layer.experts[0], tiny_moe.HIDDEN
    turn = torch.eye(hidden) + 0.2 * torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(0))
    biases = {"gate_bias": None, "up_bias": None}  # the family has none
    layer.experts[3].write(replace(fold(first, turn.double()), **biases))
    taken = capture(model, BATCHES, tmp_path / "capture", per_expert=200)
    tokens, _ = slow.tokens_of(model, layer, BATCHES)
    rank = find_criterion("aligned").rank
    ranking = rank(LayerSample.of(layer, taken), 0)
    gone = ranking.order[0]
    (to,) = (group[0] for group in ranking.groups(1) if len(group) > 1)
    assert {gone, to} == {0, 3}
    matrix, bias = ranking.aligners[gone, to]
    left = sum(
        g**2 * float((slow.output(layer, gone, x) - slow.output(layer, to, matrix @ x + bias)).square().sum())
        for x, g in slow.of_expert(tokens, gone)
    ) / len(tokens)
    plain = slow.replacement(layer, tokens, gone, to)
    assert left < 0.1 * plain
    assert ranking.costs[0] < 0.2 * plain

    small = compress(model, taken, 11 / 12, criterion="aligned", texts=BATCHES, weighted=False, refit=False)
    assert small.report.gone == [(1, gone)]
    before, after = small.report.parameters_before, small.report.parameters
    assert before - after == first.down.numel() - 2 * len(first.up)  # folding makes biases
    behind = moe_layers(small.model)[1].experts[gone]
    x = torch.stack([x for x, _ in tokens])
    torch.testing.assert_close(behind(x), layer.experts[to](x @ matrix.T + bias))
    small.save(tmp_path / "small")
    again = Compressed.load(tmp_path / "small")
    assert again.report == small.report
    assert torch.equal(again.model(**BATCHES[0]).logits, small.model(**BATCHES[0]).logits)
    assert sum(one.numel() for one in again.model.parameters()) == after


@torch.no_grad()
def test_merges_of_least_damage(text):
    ranking = find_criterion("merge").rank(text.sample, 0)
    usage = [slow.frequency(text.layer, text.tokens, expert) for expert in range(EXPERTS)]
    experts = list(text.layer.experts)
    damage = np.zeros((EXPERTS, EXPERTS))
    for i in range(EXPERTS):
        for j in range(EXPERTS):
            both = average([experts[min(i, j)], experts[max(i, j)]], [usage[min(i, j)], usage[max(i, j)]])
            for x, g in slow.of_expert(text.tokens, i):
                apart = g**2 * float((experts[i](x[None]) - both(x[None])).square().sum()) / len(text.tokens)
                damage[i, j] += apart
    damage = damage + damage.T
    assert grouped(ranking, 2) == average_linkage(damage, EXPERTS - 2)


def grouped(ranking, count):
    return sorted(sorted(group) for group in ranking.groups(count))


@torch.no_grad()
def test_groups_of_published_merges(text):
    hc, m, ream = (find_criterion(name).rank(text.sample, 0) for name in ("hc-smoe", "m-smoe", "ream"))
    distances = np.array(slow.hc_smoe_distances(text.layer, text.tokens))
    for kept in (3, 2):
        count = EXPERTS - kept
        assert grouped(hc, count) == average_linkage(distances, kept)
        for ranking, slowly in ((m, slow.m_smoe_groups), (ream, slow.ream_groups)):
            groups = slowly(text.layer, text.tokens, text.logits, kept)
            assert {group[0]: set(group) for group in ranking.groups(count)} == groups


@pytest.mark.parametrize("name", list(CRITERIA))
def test_what_goes_is_not_what_stands_for_others(name, text):
    ranking = find_criterion(name).rank(text.sample, 0)
    assert len(set(ranking.order)) == len(ranking.order) == len(ranking.costs)
    for count in range(len(ranking.order) + 1) if ranking.groups else ():
        groups = ranking.groups(count)
        assert sorted(one for group in groups for one in group) == list(range(EXPERTS))
        assert {group[0] for group in groups} == set(range(EXPERTS)) - set(ranking.order[:count])


def test_groups_of_the_router_lose_alike(tmp_path):
    text = Text("deepseek_v3", tmp_path / "capture")  # six experts in three groups, three a token from two groups
    for name in ("reap", "reconstruction"):
        assert find_criterion(name).rank(text.sample, 0).order == []  # a group is chosen by its two best
    text.layer.router_module.num_group, text.layer.router_module.topk_group = 2, 2
    for name in ("reap", "reconstruction", "random"):
        first, second = find_criterion(name).rank(text.sample, 0).order
        assert {first // 3, second // 3} == {0, 1}


@pytest.mark.parametrize("name", ["switch_transformers", "gpt_oss"])
def test_a_sample_holds_what_the_router_decided(name, tmp_path):
    model = tiny_moe.build(name)
    layer = moe_layers(model)[0]
    batches = [tiny_moe.inputs_for(model, batch=4, tokens=9)]
    sample = LayerSample.of(layer, capture(model, batches, tmp_path / "capture", per_expert=200))
    tokens, _ = slow.tokens_of(model, layer, batches)
    kept = [gates for _, gates in tokens if any(gates.values())]  # a token without room gets nothing
    usage = [sum(expert in gates for gates in kept) / len(kept) for expert in range(layer.num_experts)]
    assert torch.allclose(sample.frequency.float(), torch.tensor(usage), atol=1e-5)


def test_gradients_of_layers(text):
    """Against the gradient that each layer's output retains in an ordinary backward pass."""
    found, trained = layer_gradients(text.model, text.layers, BATCHES[:1]), text.model.training
    kept = {}

    def keep(index):
        def hook(module, args, output):
            output.retain_grad()
            kept[index] = output

        return hook

    handles = [layer.experts_module.register_forward_hook(keep(layer.index)) for layer in text.layers]
    (batch,) = BATCHES[:1]
    logits = text.model(**batch).logits[:, :-1]
    real = (batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1]).bool()
    torch.nn.functional.cross_entropy(logits[real], batch["input_ids"][:, 1:][real], reduction="sum").backward()
    assert found == pytest.approx(
        {index: float(output.grad.square().sum() / real.sum()) for index, output in kept.items()}, rel=1e-5
    )
    for handle in handles:
        handle.remove()
    assert all(parameter.requires_grad for parameter in text.model.parameters())
    assert text.model.training == trained
    text.model.zero_grad()


def test_an_unknown_criterion_is_named():
    with pytest.raises(LamellaError, match=r"criterion='nmse' is not one of .*reconstruction, energy"):
        find_criterion("nmse")
