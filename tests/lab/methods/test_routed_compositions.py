"""The compositions that decide token by token, layer by layer against the same computed directly."""

import pytest
import torch
from tests.lab.runs.test_run import KillAt, KilledError, Watch
from tests.lab.tiny_loras import QUERIES, deltas, inputs, logits_with, save_lora
from tests.lab.tiny_runs import tiny_settings

from lamella.errors import LamellaError
from lamella.lab.data import load_backbone, load_task
from lamella.lab.methods import method_from, trainable_parameters
from lamella.lab.runs.run import train

QUERY = QUERIES.format(1)


@pytest.fixture
def build(base, questions):
    def run(adapters, **method):
        task = load_task(questions)
        return method_from({**method, "adapters": adapters}).build(load_backbone(base, task), task).model.eval()

    return run


def watched(model):
    """What the second block's query layer is given and gives, and the logits."""
    seen = []
    layer = model.get_base_model().get_submodule(QUERY)
    handle = layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        logits = model(**inputs()).logits
    handle.remove()
    return *seen[-1], logits


def expected_output(base, questions, loras, x, weights):
    """``W x + sum_i g_i delta_i x`` with weights (B, T, K)."""
    layer = load_backbone(base, load_task(questions)).model.get_submodule(QUERY)
    outputs = torch.stack([x @ deltas(place)[QUERY].T for place in loras.values()], dim=-1)  # (B, T, out, K)
    with torch.no_grad():
        return layer(x) + (outputs * weights[:, :, None]).sum(-1)


def test_hidden_routing_starts_as_the_mean_and_trains_its_routers_alone(build, base, questions, loras):
    model = build(loras, name="hidden-routing")

    even = [{module: delta / 3 for module, delta in deltas(place).items()} for place in loras.values()]
    mean = {module: sum(one[module] for one in even) for module in even[0]}
    torch.testing.assert_close(model(**inputs()).logits, logits_with(base, questions, mean), rtol=1e-4, atol=1e-6)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("router" in name for name in trained)
    assert trainable_parameters(model) == 4 * 3 * 32


def test_hidden_routing_is_a_softmax_over_all_loras_for_each_token(build, base, questions, loras):
    model = build(loras, name="hidden-routing")
    router = model.get_base_model().get_submodule(QUERY).lamella_mola_router["default"]
    torch.nn.init.normal_(router.weight)

    x, found, _ = watched(model)

    weights = (x @ router.weight.T).softmax(-1)
    assert weights.std(dim=1).max() > 0.01
    torch.testing.assert_close(found, expected_output(base, questions, loras, x, weights), rtol=1e-4, atol=1e-5)


def test_hidden_routing_takes_loras_of_unlike_shapes(build, base, questions, loras, tmp_path):
    wide = save_lora(base, questions, tmp_path / "wide", 9, r=5, alpha=5, targets="q")

    found = build({"a": loras["a"], "wide": wide}, name="hidden-routing")(**inputs()).logits

    parts = {module: delta / 2 for module, delta in deltas(loras["a"]).items()}
    for module, delta in deltas(wide, scaling=1.0).items():
        parts[module] = parts[module] + delta / 2
    torch.testing.assert_close(found, logits_with(base, questions, parts), rtol=1e-4, atol=1e-6)


def test_arrow_follows_the_strongest_direction_of_each_lora(build, base, questions, tmp_path):
    # of rank 1, so that PEFT's few power iterations reach the direction
    loras = {name: save_lora(base, questions, tmp_path / name, seed, r=1, alpha=3) for seed, name in enumerate("xyz")}
    x, found, _ = watched(build(loras, name="arrow", top_k=2, temperature=0.5))

    directions = torch.stack([torch.linalg.svd(deltas(place)[QUERY])[2][0] for place in loras.values()])
    scores = (x @ directions.T).abs()
    best, at = scores.topk(2, dim=-1)
    weights = torch.zeros_like(scores).scatter(-1, at, (best / 0.5).softmax(-1))
    torch.testing.assert_close(found, expected_output(base, questions, loras, x, weights), rtol=1e-4, atol=1e-5)


def test_arrow_refuses_to_choose_more_than_there_are(build, loras):
    with pytest.raises(LamellaError, match="top_k=4"):
        build(loras, name="arrow", top_k=4)


def test_x_lora_weighs_by_its_classifier_whatever_the_loras_are_called(build, base, questions, loras):
    model = build(loras, name="xlora")
    (layer,) = model.base_model.internal_xlora_classifier.layers
    assert trainable_parameters(model) == layer.weight.numel() + layer.bias.numel()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))

    found = model(**inputs()).logits

    expected = logits_with(base, questions, deltas(loras["b.v1"]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "uniform"},
        {"name": "peft-merge", "combination": "svd"},
        {"name": "hidden-routing"},
        {"name": "arrow", "top_k": 2},
        {"name": "xlora"},
        {"name": "mole", "train_head": False},
    ],
)
def test_what_is_saved_loads_equal(build, base, questions, loras, tmp_path, method):
    model = build(loras, **method)
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim:
            torch.nn.init.normal_(parameter)
    settings = method_from({**method, "adapters": loras})
    settings.save(model, tmp_path / "saved")

    task = load_task(questions)
    loaded = settings.load(load_backbone(base, task), task, tmp_path / "saved").eval()

    assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)


def test_x_lora_refuses_a_folder_without_its_classifier(build, base, questions, loras, tmp_path):
    model = build(loras, name="xlora")
    model.save_pretrained(str(tmp_path))  # PEFT's way leaves the classifier out
    task = load_task(questions)

    with pytest.raises(LamellaError, match="not a composition of the kind 'xlora' that lamella saved"):
        method_from({"name": "xlora", "adapters": loras}).load(load_backbone(base, task), task, tmp_path)


def test_x_lora_keeps_its_last_step_since_no_checkpoint_has_all_of_it(base, questions, loras, tmp_path):
    settings = tiny_settings(base, questions, {"name": "xlora", "adapters": loras})
    with pytest.raises(LamellaError, match="keep=last"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()

    last = settings.model_copy(update={"keep": "last"})
    with pytest.raises(KilledError):
        train(last, tmp_path / "run", callbacks=[KillAt(5)])
    watch = Watch()
    train(last, tmp_path / "run", callbacks=[watch])
    assert watch.steps[0] == 1


def test_mole_starts_as_the_mean(build, base, questions, loras):
    found = build(loras, name="mole", train_head=False)(**inputs()).logits

    even = [{module: delta / 3 for module, delta in deltas(place).items()} for place in loras.values()]
    mean = {module: sum(one[module] for one in even) for module in even[0]}
    torch.testing.assert_close(found, logits_with(base, questions, mean), rtol=1e-4, atol=1e-6)
