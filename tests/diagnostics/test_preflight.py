"""Preflight: faults that only running shows are found, the model is left as it was, and the first step is watched."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tests import tiny
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from lamella import LamellaError, MolaConfig, MolexConfig
from lamella.diagnostics.preflight import Estimate, FirstStep, preflight
from lamella.tuners.mola import MolaLinear
from lamella.tuners.optimization import param_groups


def mixture(model, **config):
    torch.manual_seed(17)
    return get_peft_model(model, MolaConfig(**{"r": 2, "num_experts": 4, "top_k": 2, **config}))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, MolaLinear)]


def codes(diagnosis):
    return [finding.code for finding in diagnosis.findings]


@pytest.mark.parametrize(
    ("name", "init_lora_weights"), [("bert", True), ("bert", False), ("gpt2", True), ("llama", False), ("t5", True)]
)
def test_a_healthy_model_passes(name, init_lora_weights):
    base = tiny.MODELS[name]()
    batch = tiny.batch(base)

    actual = preflight(mixture(base, init_lora_weights=init_lora_weights), batch, steps=100)

    assert actual.ok, str(actual)
    said = "\n".join(actual.checked)
    for effect in (
        "balance loss in training mode",
        "gradient in a training step",
        "saved loads equal",
        "padding changes",
    ):
        assert effect in said
    generates = name in ("gpt2", "llama", "t5")
    assert ("generated tokens" in said) == generates
    assert actual.estimate.steps == 100
    assert actual.estimate.seconds == pytest.approx(100 * actual.estimate.seconds_per_step)
    assert actual.estimate.seconds_per_step > 0
    assert actual.estimate.peak_bytes > 0
    assert "estimate: 100 steps" in str(actual)
    assert actual.as_dict()["estimate"]["steps"] == 100


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("method", ["lora", "prompt-tuning", "full"])
def test_other_methods_pass(name, method):
    base = tiny.MODELS[name]()
    batch = tiny.batch(base)
    task_type = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    config = {
        "lora": LoraConfig(r=2, target_modules="all-linear", task_type=task_type),
        "prompt-tuning": PromptTuningConfig(num_virtual_tokens=3, task_type=task_type),
        "full": None,
    }[method]

    actual = preflight(get_peft_model(base, config) if config else base, batch)

    assert actual.ok, str(actual)
    assert "tensors bit by bit" in str(actual)


def test_as_many_labels_as_tokens_are_not_taken_for_tokens():
    base = tiny.bert(labels=7)

    assert preflight(mixture(base, init_lora_weights=False), tiny.batch(base, tokens=7)).ok


def test_an_adapter_of_another_name_passes():
    base = tiny.bert()
    batch = tiny.batch(base)
    model = get_peft_model(base, MolaConfig(r=2), adapter_name="mine")

    actual = preflight(model, batch)

    assert actual.ok, str(actual)


@pytest.mark.parametrize(("name", "training"), [("bert", True), ("llama", False), ("t5", True)])
def test_the_model_is_left_as_it_was_bit_for_bit(name, training):
    base = tiny.MODELS[name]()
    batch = tiny.batch(base)
    model = mixture(base, lora_dropout=0.2).train(training)
    layers_of(model)[0].train(not training)
    base.register_buffer("count", torch.zeros(()))
    base.register_forward_hook(lambda module, *_: module.count.add_(1) and None)
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[0].grad = torch.full_like(trained[0], 0.5)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    required = [p.requires_grad for p in model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    config = copy.deepcopy(model.peft_config["default"])
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    assert preflight(model, batch).ok

    after = model.state_dict()
    assert list(after) == list(state)
    for key, tensor in state.items():
        assert after[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == required
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert torch.equal(trained[0].grad, torch.full_like(trained[0], 0.5))
    assert all(p.grad is None for p in trained[1:])
    assert model.peft_config["default"] == config
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == random.getstate()
    assert np.array_equal(generators[2], np.random.get_state()[1])


def test_training_goes_on_as_if_nothing_had_been():
    def step(check):
        base = tiny.llama()
        batch = tiny.batch(base)
        model = mixture(base, lora_dropout=0.3).train()
        if check:
            preflight(model, batch)
        optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    plain, checked = step(False), step(True)

    assert all(torch.equal(plain[name], checked[name]) for name in plain)


def test_a_frozen_router_ends_it_before_the_cost_is_estimated():
    base = tiny.bert()
    batch = tiny.batch(base)
    model = mixture(base)
    layers_of(model)[0].lamella_mola_router.requires_grad_(False)

    actual = preflight(model, batch)

    assert codes(actual) == ["router-no-gradient"]
    assert actual.estimate is None


LORA = {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
ADDING_NOTHING = {
    "an alpha of zero": (LoraConfig(**LORA, lora_alpha=0), "4 of 4 modules"),
    "an alpha of zero somewhere": (LoraConfig(**LORA, alpha_pattern={"query": 0}), "2 of 4 modules"),
    "all dropped": (LoraConfig(**LORA, lora_dropout=1.0), "4 of 4 modules"),
    "an alpha that is zero in float32, beside a balance loss": (MolaConfig(**LORA, lora_alpha=1e-60), "4 of 4 modules"),
    "neither guests nor LoRA": (MolexConfig(alpha=1, lora=None, task_type="SEQ_CLS"), "no guest"),
}


@pytest.mark.parametrize("case", ADDING_NOTHING)
def test_what_adds_nothing_whatever_it_learns_is_found(case):
    config, said = ADDING_NOTHING[case]
    base = tiny.bert()

    actual = preflight(get_peft_model(base, config), tiny.batch(base))

    assert codes(actual) == ["adds-nothing"], actual
    assert said in str(actual)


def test_a_run_that_trains_nothing_is_found():
    base = tiny.llama()

    actual = preflight(get_peft_model(base, MolexConfig(policy="random", lora=None)), tiny.batch(base))

    assert codes(actual) == ["nothing-to-train"]


def test_a_balance_loss_that_is_perfect_on_the_batch_is_no_fault(monkeypatch):
    """Two experts, one each, for two tokens alike in number: the balance loss is flat on this batch."""
    base = tiny.bert()
    batch = tiny.batch(base)
    model = mixture(base, num_experts=2, top_k=1, target_modules=["query"])
    alternate = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    for layer in layers_of(model):
        router = layer.lamella_mola_router["default"]
        route = type(router).route

        def even(logits, top_k, router=router, route=route):
            if len(logits) == 21:  # the batch given; with its padding 18 tokens are real
                size = len(logits)
                logits = logits * 0 + alternate.repeat(size // 2 + 1, 1)[:size]
            return route(router, logits, top_k)

        monkeypatch.setattr(router, "route", even)

    assert preflight(model, {"input_ids": batch["input_ids"], "labels": batch["labels"]}).ok


class PoolsOverPositions(nn.Module):
    """A head that reads the mean over all positions, padding and later ones included."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x + 20 * x.mean(1, keepdim=True))


def test_a_layer_that_reads_padding():
    base = tiny.bert()
    batch = tiny.batch(base)
    base.bert.encoder.layer[1].output.dense = PoolsOverPositions(base.bert.encoder.layer[1].output.dense)

    assert codes(preflight(mixture(base, target_modules=["query", "value"]), batch)) == ["padding-changes-output"]


def test_a_layer_that_forgets_the_cache():
    base = tiny.llama()
    batch = tiny.batch(base)
    down = base.model.layers[0].mlp.down_proj
    # looks at the token before it, which with a cache is not there
    down.register_forward_hook(lambda module, args, y: y + 0.5 * torch.cat([y[:, :1] * 0, y[:, :-1]], 1))

    assert codes(preflight(mixture(base, target_modules=["q_proj"]), batch)) == ["cache-changes-output"]


def test_a_state_that_is_not_saved():
    base = tiny.bert()
    batch = tiny.batch(base)
    model = mixture(base, init_lora_weights=False)
    layer = layers_of(model)[0]
    layer.experts["default"] = replace(layer.experts["default"], top_k=1)  # of the config's top-2

    actual = preflight(model, batch)

    assert codes(actual) == ["saved-unequal"]
    assert "outputs differ" in actual.findings[0].what


def test_an_estimate_can_be_read():
    assert str(Estimate(0.5, 9000, 612_000_000)).startswith("9,000 steps of 0.5 s: 1 h 15 min 00 s")
    assert "612 MB" in str(Estimate(0.5, 9000, 612_000_000))


def first_step(model, batch, optimizer=None, tmp="out"):
    model.train()
    optimizer = optimizer or torch.optim.AdamW(param_groups(model, 1e-3))
    model(**batch).loss.backward()
    callback = FirstStep()
    arguments = TrainingArguments(output_dir=tmp, report_to="none", use_cpu=True)
    for _ in range(2):
        callback.on_pre_optimizer_step(arguments, TrainerState(), TrainerControl(), model=model, optimizer=optimizer)


@pytest.mark.parametrize("config", [{}, {"top_k": 1}, {"router_aux_loss_coef": 0.0}, {"num_experts": "1-2"}])
def test_a_healthy_first_step_passes(config, tmp_path):
    base = tiny.bert()
    first_step(mixture(base, **config), tiny.batch(base), tmp=tmp_path)


def test_a_router_outside_the_optimizer(tmp_path):
    base = tiny.bert()
    model = mixture(base)
    experts = [p for name, p in model.named_parameters() if p.requires_grad and "router" not in name]

    with pytest.raises(LamellaError, match=r"attention\.self\.query is not in the optimizer"):
        first_step(model, tiny.batch(base), torch.optim.AdamW(experts), tmp_path)


def test_a_first_step_without_balance_loss(tmp_path, monkeypatch):
    base = tiny.bert()
    monkeypatch.setattr(MolaLinear, "_attach_losses", lambda self, adapter, routing, mask, frame: routing)

    with pytest.raises(LamellaError, match="No balance loss arrived"):
        first_step(mixture(base), tiny.batch(base), tmp=tmp_path)


def test_a_router_without_gradient_in_the_first_step(tmp_path):
    base = tiny.bert()
    model = mixture(base)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3))
    layers_of(model)[4].lamella_mola_router.requires_grad_(False)

    with pytest.raises(LamellaError, match="got no gradient"):
        first_step(model, tiny.batch(base), optimizer, tmp_path)
