"""Random LoRAs, a fresh one and learned weights: what they keep of the given LoRAs, what trains, and what is saved."""

import pytest
import torch
from tests.lab.tiny_loras import deltas, inputs, logits_with, save_lora
from tests.lab.tiny_runs import tiny_settings

from lamella.errors import LamellaError
from lamella.kernels import FrozenLoras
from lamella.lab.data import load_backbone, load_task
from lamella.lab.methods import method_from, trainable_parameters
from lamella.lab.methods.controls import random_loras
from lamella.lab.runs.run import train


@pytest.fixture
def build(base, questions):
    def run(adapters, **method):
        task = load_task(questions)
        torch.manual_seed(0)
        return method_from({**method, "adapters": adapters}).build(load_backbone(base, task), task).model.eval()

    return run


def logits(model):
    with torch.no_grad():
        return model(**inputs()).logits


def reloaded(model, adapters, base, questions, folder, **method):
    settings, task = method_from({**method, "adapters": adapters}), load_task(questions)
    settings.save(model, folder)
    return settings.load(load_backbone(base, task), task, folder).eval()


def test_random_loras_keep_each_deltas_norm_and_nothing_else():
    torch.manual_seed(1)
    given = FrozenLoras(torch.randn(5, 7), torch.randn(6, 5), (2, 0, 3))
    drawn = random_loras(given)
    for columns in (slice(0, 2), slice(2, 5)):
        own = given.B[:, columns] @ given.A[columns]
        other = drawn[1][:, columns] @ drawn[0][columns]
        torch.testing.assert_close(other.norm(), own.norm())
        assert (own * other).sum().abs() < 0.6 * own.norm() ** 2


def test_mole_over_random_loras_trains_its_routers_and_is_saved_whole(build, base, questions, loras, tmp_path):
    model, given = build(loras, name="mole-random", train_head=False), build(loras, name="mole", train_head=False)
    assert not torch.allclose(logits(model), logits(given))
    assert trainable_parameters(model) == trainable_parameters(given)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("router" in name for name in trained)
    again = reloaded(model, loras, base, questions, tmp_path / "saved", name="mole-random", train_head=False)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(LamellaError, match="embed_adapters"):
        method_from({"name": "mole-random", "adapters": loras, "embed_adapters": False})


def test_a_fresh_lora_starts_at_the_base_in_the_modules_of_the_others(build, base, questions, loras):
    model = build(loras, name="fresh-lora")
    torch.testing.assert_close(logits(model), logits_with(base, questions, {}))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    modules = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained}
    assert modules == set(deltas(loras["a"]))
    rank_four = trainable_parameters(build(loras, name="fresh-lora", r=4))
    assert rank_four == 2 * trainable_parameters(model)


def test_learned_weights_start_as_the_mean_and_are_saved_as_one_lora(build, base, questions, loras, tmp_path):
    adapters = {**loras, "wide": save_lora(base, questions, tmp_path / "wide", 9, r=5, alpha=15, targets="q")}
    model = build(adapters, name="learned-weights")
    given = {name: deltas(place) for name, place in adapters.items()}

    def together(weights):
        return {
            module: sum(weights[name] * own[module] for name, own in given.items() if module in own)
            for module in given["a"]
        }

    total = together(dict.fromkeys(adapters, 1.0))
    even = {module: one / (4 if "query" in module else 3) for module, one in total.items()}
    mean = logits_with(base, questions, even)
    torch.testing.assert_close(logits(model), mean, rtol=1e-4, atol=1e-5)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(len(one) for one in weights) == [3, 3, 4, 4]  # "wide" adapts queries alone
    with torch.no_grad():
        for one in weights:
            one.copy_(torch.tensor([0.5, -0.25, 2.0, 1.5])[: len(one)])
    expected = logits_with(base, questions, together(dict(zip(adapters, [0.5, -0.25, 2.0, 1.5], strict=True))))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    again = reloaded(model, adapters, base, questions, tmp_path / "saved", name="learned-weights")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


def test_gates_are_mole_with_a_gate_for_each_lora_matrix_and_token(build, base, questions, loras, tmp_path):
    model = build(loras, name="gates")
    total = {module: sum(deltas(place)[module] for place in loras.values()) for module in deltas(loras["a"])}
    torch.testing.assert_close(logits(model), logits_with(base, questions, total), rtol=1e-4, atol=1e-5)
    config = model.peft_config["default"]
    assert (config.granularity, config.router_input, config.score) == ("matrix", "token", "sigmoid")
    assert {name.split(".")[-3] for name, one in model.named_parameters() if one.requires_grad} == {
        "lamella_mole_router"
    }
    for parameter in (one for one in model.parameters() if one.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    again = reloaded(model, loras, base, questions, tmp_path / "saved", name="gates")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["mole-random", "fresh-lora", "learned-weights", "gates"])
def test_a_run_learns_what_trains_alone(name, base, questions, loras, tmp_path):
    more = {"train_head": False} if name == "mole-random" else {}
    settings = tiny_settings(base, questions, {"name": name, "adapters": loras, **more}, keep="last")
    run = train(settings, tmp_path / "run")
    assert run.metrics["steps"] == 6
