"""Every way to compose trained LoRAs, against the same sums computed on the base's weights."""

import sys

import pytest
import torch
from tests.lab.tiny_loras import deltas, factors, inputs, logits_with, save_lora

from lamella.errors import LamellaError
from lamella.lab.data import load_backbone, load_task
from lamella.lab.methods import method_from, trainable_parameters

SCALING = 3.0


@pytest.fixture
def answer(base, questions):
    """Builds a method on the base; gives what it built and its logits."""

    def run(adapters, **method):
        task = load_task(questions)
        built = method_from({**method, "adapters": adapters}).build(load_backbone(base, task), task)
        with torch.no_grad():
            return built, built.model.eval()(**inputs()).logits

    return run


def total(parts):
    """Deltas by module, added."""
    modules = {module for part in parts for module in part}
    return {module: sum(part[module] for part in parts if module in part) for module in modules}


def scaled(part, weight):
    return {module: weight * delta for module, delta in part.items()}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_one_alone_is_that_one(answer, base, questions, loras):
    built, logits = answer(loras, name="single", adapter="b.v1")

    close(logits, logits_with(base, questions, deltas(loras["b.v1"])))
    assert trainable_parameters(built.model) == 0
    assert not torch.allclose(logits, logits_with(base, questions, {}), atol=1e-3)


@pytest.mark.parametrize(("name", "weight"), [("uniform", 1 / 3), ("sum", 1.0)])
def test_fixed_sums_are_sums_of_deltas(answer, base, questions, loras, name, weight):
    built, logits = answer(loras, name=name)

    close(logits, logits_with(base, questions, total([scaled(deltas(place), weight) for place in loras.values()])))
    assert trainable_parameters(built.model) == 0


def test_ranks_scalings_and_modules_may_differ_in_a_sum(answer, base, questions, loras, tmp_path):
    wide = save_lora(base, questions, tmp_path / "wide", 9, r=5, alpha=5, targets="q")

    _, logits = answer({"a": loras["a"], "wide": wide}, name="sum")

    close(logits, logits_with(base, questions, total([deltas(loras["a"]), deltas(wide, scaling=1.0)])))


def by_factor(loras, down, up):
    """``s (sum up B)(sum down A)`` of each module."""
    read = {name: factors(place) for name, place in loras.items()}
    return {
        module: SCALING
        * sum(up[name] * read[name][module][1] for name in loras)
        @ sum(down[name] * read[name][module][0] for name in loras)
        for module in next(iter(read.values()))
    }


def test_pem_adds_factors_and_negates_b_alone(answer, base, questions, loras):
    weights = {"a": 0.5, "b.v1": 0.7, "c c": -0.4}

    _, logits = answer(loras, name="pem", weights=weights)
    _, even = answer(loras, name="pem")

    sizes = {name: abs(weight) for name, weight in weights.items()}
    close(logits, logits_with(base, questions, by_factor(loras, sizes, weights)))
    thirds = dict.fromkeys(loras, 1 / 3)
    close(even, logits_with(base, questions, by_factor(loras, thirds, thirds)))


def test_factors_that_do_not_correspond_are_refused(answer, base, questions, loras, tmp_path):
    wide = save_lora(base, questions, tmp_path / "wide", 9, r=5)

    with pytest.raises(LamellaError, match=r"a: rank 2, scaling 3; wide: rank 5, scaling 1\.2.*'uniform'"):
        answer({"a": loras["a"], "wide": wide}, name="pem")
    with pytest.raises(LamellaError, match="same LoRAs; 'c c'"):
        answer(loras, name="pem", weights={"a": 1.0, "b.v1": 1.0})
    with pytest.raises(LamellaError, match=r"Arrow.*one rank"):
        answer({"a": loras["a"], "wide": wide}, name="arrow", top_k=1)
    with pytest.raises(LamellaError, match="PEFT cannot merge"):
        answer({"a": loras["a"], "wide": wide}, name="peft-merge", combination="linear")


def test_peft_cat_is_the_sum_of_deltas(answer, base, questions, loras):
    _, logits = answer(loras, name="peft-merge", combination="cat", weight=1.0)

    close(logits, logits_with(base, questions, total([deltas(place) for place in loras.values()])))


def test_peft_svd_is_the_nearest_delta_of_that_rank(answer, base, questions, loras):
    _, logits = answer(loras, name="peft-merge", combination="svd", svd_rank=2)

    mean = total([scaled(deltas(place), 1 / 3) for place in loras.values()])
    nearest = {}
    for module, delta in mean.items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        nearest[module] = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
    close(logits, logits_with(base, questions, nearest))


def on_factors(loras, combine):
    """A merge of A and of B by themselves, each LoRA multiplied by the root of its weight and scaling."""
    read = [factors(place) for place in loras.values()]
    root = (SCALING / len(read)) ** 0.5
    merged = {}
    for module in read[0]:
        A, B = (combine([one[module][which] for one in read], root) for which in (0, 1))
        merged[module] = B @ A
    return merged


def pruned(tensor, density):
    keep = int(density * tensor.numel())
    kept = torch.zeros(tensor.numel())
    order = tensor.abs().flatten().argsort(descending=True)[:keep]
    kept[order] = tensor.flatten()[order]
    return kept.view_as(tensor)


def linear(tensors, root):
    return sum(root * one for one in tensors)


def magnitude_prune(tensors, root):
    return sum(root * pruned(one, 0.5) for one in tensors)


def ties(tensors, root):
    trimmed = torch.stack([pruned(one, 0.5) for one in tensors])
    agrees = torch.sign(trimmed) == torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    return (root * trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@pytest.mark.parametrize("combine", [linear, magnitude_prune, ties])
def test_peft_merges_of_factors(answer, base, questions, loras, combine):
    _, logits = answer(loras, name="peft-merge", combination=combine.__name__, density=0.5)

    close(logits, logits_with(base, questions, on_factors(loras, combine)))


def test_peft_dare_drops_by_the_seed_and_nothing_at_full_density(answer, base, questions, loras):
    def drop(seed, density):
        torch.manual_seed(seed)
        return answer(loras, name="peft-merge", combination="dare_linear", density=density)[1]

    close(drop(0, 1.0), logits_with(base, questions, on_factors(loras, linear)))
    assert torch.equal(drop(0, 0.5), drop(0, 0.5))
    assert not torch.equal(drop(0, 0.5), drop(1, 0.5))


def test_the_best_is_the_one_with_the_best_score_on_training_rows(answer, questions, loras):
    built, logits = answer(loras, name="best")

    scores = built.decided["training_scores"]
    assert scores.keys() == loras.keys()
    assert len(set(scores.values())) > 1
    assert scores[built.decided["chosen"]] == max(scores.values())
    close(logits, answer(loras, name="single", adapter=built.decided["chosen"])[1])


def test_lorahub_finds_the_weights_of_the_lowest_loss(answer, base, questions, loras, monkeypatch):
    module = "bert.encoder.layer.0.attention.self.query"
    wanted = 0.7 * factors(loras["a"])[module][1] - 0.5 * factors(loras["c c"])[module][1]

    def loss(model):
        found = model.get_base_model().get_submodule(module).lora_B["default"].weight
        return {"loss": 100 * float((found - wanted).square().mean())}

    monkeypatch.setattr("lamella.lab.methods.searched.scores_on_training_rows", lambda *_: loss)
    torch.manual_seed(0)
    built, logits = answer(loras, name="lorahub", evaluations=300)

    weights = built.decided["weights"]
    assert list(weights.values()) == pytest.approx([0.7, 0.0, -0.5], abs=0.05)
    # the regulariser costs 0.05 times the mean of the absolute weights
    assert built.decided["objective"] == pytest.approx(0.05 * 1.2 / 3, abs=0.005)
    close(logits, logits_with(base, questions, by_factor(loras, weights, weights)))


def test_lorahub_tries_no_more_weights_than_it_may(answer, loras):
    first = answer(loras, name="lorahub", examples=16, evaluations=1)[0].decided
    more = answer(loras, name="lorahub", examples=16, evaluations=12)[0].decided

    assert set(first["weights"].values()) == {0.0}
    assert more["objective"] <= first["objective"]
    assert all(abs(weight) <= 1.5 for weight in more["weights"].values())


def test_lorahub_says_what_it_needs(answer, loras, monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)

    with pytest.raises(LamellaError, match=r"lamella\[search\]"):
        answer(loras, name="lorahub")


def test_a_lora_of_a_run_is_found_in_it(answer, base, questions, loras, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("")
    (tmp_path / "run" / "adapter").symlink_to(loras["a"])

    close(answer({"a": str(tmp_path / "run")}, name="sum")[1], logits_with(base, questions, deltas(loras["a"])))


@pytest.mark.parametrize("name", ["uniform", "best", "hidden-routing", "xlora"])
def test_a_new_head_that_nobody_trains_is_refused(bert, questions, loras, name):
    task = load_task(questions)

    with pytest.raises(LamellaError, match="its new one is random"):
        method_from({"name": name, "adapters": loras}).build(load_backbone(bert, task), task)


def test_an_unknown_lora_is_named(answer, loras):
    with pytest.raises(LamellaError, match=r"no LoRA 'adapters\.b'\. .*Known here are: a, b\.v1, c c"):
        answer(loras, name="single", adapter="b")
