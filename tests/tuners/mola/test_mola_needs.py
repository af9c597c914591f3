"""What each block needs of experts, against slow references, and how a budget is shared out by it."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tests import tiny
from tests.reference import mola
from torch import nn

from lamella import LamellaError, MolaConfig, allocate, redundancy
from lamella.progress import listening
from lamella.tuners.mola.needs import contribution, distinctness, diversity, heavy_tails, of_one_depth

needs = st.lists(st.floats(0, 1e300) | st.sampled_from([0.0, 1.0, 1e-300]), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(needs, st.integers(4, 40))
def test_an_allocation_by_needs_sums_to_its_budget_and_follows_them(need: list[float], quarters: int) -> None:
    experts = allocate("auto", len(need), quarters / 4, need)
    assert sum(experts) == round(quarters / 4 * len(need))
    assert min(experts) >= 1
    for one, count in zip(need, experts, strict=True):
        assert all(count >= others for other, others in zip(need, experts, strict=True) if one > other)


def test_an_allocation_by_needs_says_what_it_lacks() -> None:
    assert allocate("auto", 3, 2, [0.0, 0.0, 0.0]) == [2, 2, 2]
    for given_, message in (
        ((3, 2), "needs a model"),
        ((3, None, [1.0] * 3), "expert_budget"),
        ((2, 2, [1.0]), "each of 2"),
    ):
        with pytest.raises(LamellaError, match=message):
            allocate("auto", *given_)
    with pytest.raises(LamellaError, match="num_experts='auto' shares a budget out; give expert_budget"):
        MolaConfig(num_experts="auto")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_heavy_tails_are_hills_estimator_over_a_blocks_weights(name: str) -> None:
    model = tiny.MODELS[name]()
    ((stack, found),) = heavy_tails(model).items()
    for block, value in zip(model.get_submodule(stack), found, strict=True):
        weights = [one for key, one in block.named_parameters() if one.dim() == 2 and key.endswith("weight")]
        exponents = [mola.hill_exponent(one.detach()) for one in weights]
        assert value == pytest.approx((sum(exponents) / len(exponents)) ** 2.5, rel=1e-3)


def test_what_adapters_have_added_has_no_tail() -> None:
    expected = heavy_tails(tiny.bert())
    lora = LoraConfig(r=2, target_modules=["query"], layers_to_transform=[0])
    assert heavy_tails(inject_adapter_in_model(lora, tiny.bert(), adapter_name="lora")) == expected
    assert heavy_tails(tiny.adapted(tiny.bert()).get_base_model()) == expected


def test_a_planted_tail_is_found_and_gets_fewer_experts() -> None:
    model = tiny.bert(layers=2)
    values = torch.arange(1, 17) ** (-1 / (1.7 - 1))  # eigenvalues of a density with the exponent 1.7
    with torch.no_grad():
        for module in model.bert.encoder.layer[0].modules():
            if isinstance(module, nn.Linear):
                U, _, V = torch.linalg.svd(module.weight, full_matrices=False)
                module.weight.copy_(U * values.sqrt() @ V)
    heavy, light = heavy_tails(model)["bert.encoder.layer"]
    assert heavy ** (1 / 2.5) == pytest.approx(1.7, rel=0.15)
    assert heavy < light


def test_auto_is_resolved_once_and_saved_as_a_list(tmp_path: Path) -> None:
    config = MolaConfig(num_experts="auto", expert_budget=2.5, top_k=2, r=2, init_lora_weights=False)
    model = get_peft_model(tiny.bert(layers=4), config).eval()
    experts = model.base_model.summary().experts["bert.encoder.layer"]
    assert experts == allocate("auto", 4, 2.5, heavy_tails(tiny.bert(layers=4))["bert.encoder.layer"])
    assert sum(experts) == 10
    assert config.num_experts == "auto"  # to be used again, on another model
    model.save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    assert (saved.num_experts, saved.expert_budget) == (experts, None)
    other = tiny.bert(layers=4)
    with torch.no_grad():  # whatever the base's weights are
        other.bert.encoder.layer[0].output.dense.weight.zero_()
    assert PeftModel.from_pretrained(other, tmp_path).base_model.summary().experts == {"bert.encoder.layer": experts}
    with torch.device("meta"):  # to be counted, without numbers
        counted = get_peft_model(tiny.bert(layers=4), MolaConfig(num_experts="auto", expert_budget=3))
    assert counted.base_model.summary().experts == {"bert.encoder.layer": [3] * 4}


def test_stacks_of_one_depth_share_an_allocation_and_others_are_refused() -> None:
    assert of_one_depth({"a": [1.0, 3.0], "b": [2.0, 2.0]}) == [0.375, 0.625]
    model = get_peft_model(tiny.t5(), MolaConfig(num_experts="auto", expert_budget=2, r=2))
    assert all(sum(experts) == 4 for experts in model.base_model.summary().experts.values())
    with pytest.raises(LamellaError, match=r"a, b have 1, 2 blocks"):
        of_one_depth({"a": [1.0], "b": [1.0, 2.0]})


@pytest.mark.parametrize("tasks", [1, 3])
@torch.no_grad()
def test_diversity_is_one_minus_the_mean_cosine_of_the_tasks_representations(tasks: int) -> None:
    model = tiny.llama().double()
    given_ = [[tiny.inputs(model, seed=10 * task + seed) for seed in range(2)] for task in range(tasks)]
    found = diversity(model, given_)["model.layers"]
    for block, value in enumerate(found):
        seen: list[torch.Tensor] = []
        hook = model.model.layers[block].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        of_tasks = []
        for batches in given_:
            documents = []
            for batch in batches:
                model(**batch)
                states = seen[-1] if isinstance(seen[-1], torch.Tensor) else seen[-1][0]
                documents += [
                    row[mask.bool()].mean(0) for row, mask in zip(states, batch["attention_mask"], strict=True)
                ]
            of_tasks.append(documents)
        hook.remove()
        of_tasks = of_tasks if tasks > 1 else [[one] for one in of_tasks[0]]
        assert value == pytest.approx(mola.task_diversity(of_tasks), rel=1e-6)
    with pytest.raises(LamellaError, match="2 stacks"):
        diversity(tiny.t5(), given_)


@pytest.mark.parametrize("start", [False, "svd"])
@torch.no_grad()
def test_contribution_is_the_loss_without_each_expert(start: bool | str) -> None:
    model = tiny.adapted(tiny.bert(), num_experts=[1, 3], top_k=[1, 2], init_lora_weights=start).eval()
    for layer in (module for module in model.modules() if isinstance(module, tiny.MolaLinear)):
        layer.factors("default")[1].add_(0.5)
    batch = tiny.batch(model.get_base_model())
    before = copy.deepcopy(model.state_dict())

    def loss(of: nn.Module = model) -> float:
        return float(of(**batch).loss)

    told: list[tuple[int, int | None]] = []
    with listening(lambda work: told.append((work.done, work.total))):
        found = contribution(model, loss)["bert.encoder.layer"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    expected = []
    for block, count in ((0, 1), (1, 3)):
        expected.append(0.0)
        for expert in range(count):
            without = copy.deepcopy(model)
            for layer in (module for module in without.modules() if isinstance(module, tiny.MolaLinear)):
                if layer.place.stack and layer.place.layer == block:
                    factors, starts = layer.factors("default"), layer.starts("default")
                    for factor, value in (
                        zip(factors, starts, strict=True) if starts else [(factors[1], factors[1] * 0)]
                    ):
                        factor[expert] = value[expert]
            expected[-1] += max(0.0, loss(without) - loss())
    assert found == pytest.approx(expected, abs=1e-6)
    assert max(found) > 0


def test_distinctness_is_redundancy_by_block_and_one_expert_has_the_others_mean() -> None:
    model = tiny.adapted(tiny.bert(layers=3), num_experts=[1, 3, 2], top_k=[1, 2, 2])
    by_layer = redundancy(model).groupby("layer")["normalised"].mean()
    found = distinctness(model)["bert.encoder.layer"]
    assert found[1:] == pytest.approx([by_layer[1], by_layer[2]])
    assert found[0] == pytest.approx(sum(found[1:]) / 2)
    with pytest.raises(LamellaError, match="no trained LoRA experts"):
        distinctness(tiny.adapted(tiny.bert(), init_lora_weights=True))
