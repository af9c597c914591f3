"""Only routers train, whatever runs the training; the balance loss is what it says and has the task loss's scale."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from peft import PeftModel
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from lamella import LamellaError, MoleConfig, compose, masked_experts
from lamella.routing import collect_losses, loss_scale
from lamella.routing.balance import balance_loss, entropy_loss

MODES = {"none": None, "non-reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


def composition(kind: str, folder: Path, **config: object) -> PeftModel:
    """Without the modules outside the blocks, where there are any: each has a router of its own."""
    outside = ["pooler.dense"] if kind == "bert" else None
    return trained.composition(kind, folder, exclude_modules=outside, **config)


def step(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model.train()(**given).loss.backward()
    return tiny.gradients(model)


@pytest.mark.parametrize(
    ("kind", "sharp", "granularity"),
    [
        ("bert", False, "matrix"), ("bert", True, "network"), ("distilbert", True, "block"),
        ("llama", True, "sublayer"),
        ("llama", False, "network"), ("gpt2", True, "matrix"), ("t5", False, "block"), ("t5", True, "network"),
    ],
)  # fmt: skip
def test_every_router_gets_a_gradient_and_nothing_else_does(
    kind: str, sharp: bool, granularity: str, folder: Path
) -> None:
    model = composition(kind, folder, sharp=sharp, granularity=granularity)
    actual = step(model, tiny.batch(model.get_base_model()))
    assert actual
    assert all("mole_router" in name for name in actual)
    units = {layer.groups["default"] for layer in trained.layers_of(model).values()}
    biases = [gradient for name, gradient in actual.items() if name.endswith(".bias")]
    assert len(biases) == len(units)
    assert all(torch.isfinite(gradient).all() for gradient in actual.values())
    for unit in units:  # a module that one LoRA alone adapts still tells its router something
        assert unit.router.bias.requires_grad
    assert all(gradient.any() for gradient in biases)


@pytest.mark.parametrize(
    "config",
    [
        {"top_k": 1}, {"top_k": 2, "granularity": "sublayer", "router_input": "token"},
        {"top_k": 1, "granularity": "block", "router_input": "token"}, {"top_k": 2, "granularity": "network"},
        {"top_k": 1, "router_input": "token", "score": "sigmoid"},
        {"granularity": "block", "router_input": "token", "score": "sigmoid"},
        {"top_k": 2, "granularity": "network", "router_input": "token", "score": "sigmoid"},
    ],
    ids=str,
)  # fmt: skip
def test_gradients_reach_every_router_of_few_loras_and_of_gates(config: dict[str, object], tmp_path: Path) -> None:
    paths = {f"lora{i}": trained.random_lora(tmp_path, i) for i in range(4)}
    model = compose(tiny.bert().double(), paths, MoleConfig(balance="none", **config))
    trained.sharpen(model)
    gradients = step(model, tiny.batch(model.get_base_model()))
    for part in (".e", ".bias"):
        assert len([name for name in gradients if name.endswith(part)]) == len(trained.routers_of(model))
    assert all(bool(gradient.any()) for gradient in gradients.values())


@pytest.mark.parametrize(
    ("kind", "mode", "granularity", "balance", "router_input"),
    [
        ("bert", "reentrant", "network", "log", "mean"), ("bert", "non-reentrant", "matrix", "entropy", "mean"),
        ("llama", "reentrant", "matrix", "log", "mean"), ("llama", "non-reentrant", "network", "entropy", "mean"),
        ("t5", "reentrant", "network", "entropy", "mean"), ("t5", "non-reentrant", "block", "log", "mean"),
        ("t5", "reentrant", "sublayer", "log", "mean"), ("t5", "reentrant", "network", "log", "token"),
        ("t5", "non-reentrant", "network", "entropy", "token"),
    ],
)  # fmt: skip
def test_checkpointing_changes_no_gradient(
    kind: str, mode: str, granularity: str, balance: str, router_input: str, folder: Path
) -> None:
    results = []
    for each in ("none", mode):
        model = composition(kind, folder, granularity=granularity, balance=balance, router_input=router_input)
        if MODES[each] is not None:
            model.gradient_checkpointing_enable(MODES[each])
            model.enable_input_require_grads()
            assert model.get_base_model().is_gradient_checkpointing
        results.append(step(model, tiny.batch(model.get_base_model())))
    tiny.assert_same(results[1], results[0])
    assert all(gradient.any() for name, gradient in results[0].items() if name.endswith(".bias"))


@pytest.mark.parametrize("inside", [True, False])
def test_parts_of_a_block_that_are_recomputed_by_themselves_share_its_decision(inside: bool, folder: Path) -> None:
    """Some blocks have parts that are checkpointed, inside of what is (a hybrid block) or in its place (a stage)."""
    results = []
    for checkpointed in (False, True):
        base = tiny.llama().double()
        for block in base.model.layers:
            for part in (block.self_attn, block.mlp):
                part.__class__ = type("Part", (GradientCheckpointingLayer, type(part)), {})
                part.gradient_checkpointing = False
        settings = {"granularity": "block", "balance": "entropy"}
        model = trained.composed(base, "llama", folder, **settings)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for block in base.model.layers:
                block.gradient_checkpointing = inside
        results.append(step(model, tiny.batch(base)))
    tiny.assert_same(results[1], results[0])


@pytest.mark.parametrize(
    ("balance", "router_input", "mode"),
    [
        ("log", "mean", "none"),
        ("log", "token", "non-reentrant"),
        ("entropy", "token", "none"),
        ("switch", "mean", "none"),
    ],
)
def test_the_attached_loss_is_the_collected_one(balance: str, router_input: str, mode: str, folder: Path) -> None:
    config = {"balance": balance, "router_input": router_input, "granularity": "sublayer"}
    given = tiny.batch(tiny.bert())
    attached = step(composition("bert", folder, **config), given)
    model = composition("bert", folder, **config)
    if MODES[mode] is not None:
        model.gradient_checkpointing_enable(MODES[mode])
        model.enable_input_require_grads()
    with collect_losses() as losses:
        loss = model.train()(**given).loss
    assert len(losses.by_name) == (1 if balance == "log" else 4)
    (loss + losses.total()).backward()
    tiny.assert_same(tiny.gradients(model), attached)
    without = step(composition("bert", folder, **{**config, "balance": "none"}), given)
    assert any((attached[name] - gradient).norm() > 1e-4 for name, gradient in without.items())


@settings(max_examples=3, deadline=None)
@drawn(granularity=st.sampled_from(["matrix", "block", "network"]), coefficient=st.floats(0.1, 2))
def test_log_balance_starts_at_n_ln_n_and_is_one_loss_of_all_routers(
    granularity: str, coefficient: float, folder: Path
) -> None:
    given = tiny.batch(tiny.bert())
    config = {"granularity": granularity, "balance": "log", "router_aux_loss_coef": coefficient}
    with collect_losses() as losses:
        composition("bert", folder, sharp=False, **config).train()(**given)
    assert float(losses.total()) == pytest.approx(coefficient * 3 * math.log(3))
    model = composition("bert", folder, **config).train()
    with collect_losses() as losses, tiny.watch(model) as seen:
        model(**given)
    overall = torch.stack([routing.probs.mean(dim=0) for _, routing, _ in seen]).mean(dim=0)
    assert float(losses.total()) == pytest.approx(-coefficient * float(overall.log().sum()))
    assert float(losses.total()) > coefficient * 3 * math.log(3)


def test_entropy_and_switch_are_means_in_a_block_and_sums_over_blocks(folder: Path) -> None:
    given = tiny.batch(tiny.bert())
    for balance in ("entropy", "switch"):
        model = composition("bert", folder, granularity="matrix", balance=balance, router_aux_loss_coef=0.3).train()
        with collect_losses() as losses, tiny.watch(model) as seen:
            model(**given)
        by_block: dict[int, list[Tensor]] = {}
        for place, routing, mask in seen:
            logits = routing.logits
            top = logits.argmax(dim=-1, keepdim=True)
            own = entropy_loss(logits, mask) if balance == "entropy" else balance_loss(logits, top, mask)
            by_block.setdefault(place.layer, []).append(own)
        expected = 0.3 * sum(torch.stack(losses).mean() for losses in by_block.values())
        torch.testing.assert_close(losses.total().detach(), expected.detach())


@pytest.mark.parametrize("balance", ["log", "entropy", "switch"])
def test_padding_pays_nothing(balance: str, folder: Path) -> None:
    model = composition("bert", folder, router_input="token", balance=balance).train()
    given = tiny.batch(model.get_base_model())
    wide = {name: nn.functional.pad(value, (0, 3)) if value.dim() == 2 else value for name, value in given.items()}
    totals = []
    for one in (given, wide):
        with collect_losses() as losses:
            model(**one)
        totals.append(losses.total().detach())
    torch.testing.assert_close(totals[0], totals[1])


def test_the_balance_loss_carries_the_scale_of_the_task_loss(folder: Path) -> None:
    given = tiny.batch(tiny.bert())
    whole = step(composition("bert", folder, balance="log"), given)
    model = composition("bert", folder, balance="log").train()
    (model(**given).loss / 4).backward()
    quarter = tiny.gradients(model)
    tiny.assert_same({name: 4 * gradient for name, gradient in quarter.items()}, whole)
    with loss_scale(model, 0.25):
        logits = model(**{name: value for name, value in given.items() if name != "labels"}).logits
        (nn.functional.cross_entropy(logits, given["labels"]) / 4).backward()
    tiny.assert_same(tiny.gradients(model), quarter)


def test_no_balance_loss_in_evaluation(folder: Path) -> None:
    given = tiny.batch(tiny.bert())
    results = []
    for balance in ("log", "none"):
        model = composition("bert", folder, balance=balance)
        model.eval()(**given).loss.backward()
        results.append(tiny.gradients(model))
    tiny.assert_same(*results)


def test_reentrant_checkpointing_cannot_collect(folder: Path) -> None:
    model = composition("bert", folder, balance="log").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with collect_losses(), pytest.raises(LamellaError, match="reentrant"):
        model(**tiny.batch(model.get_base_model()))


@pytest.mark.parametrize("learn", [True, False])
def test_the_temperature_starts_where_it_says_and_stays_positive(learn: bool, folder: Path) -> None:
    model = composition("bert", folder, sharp=False, temperature=0.37, learn_temperature=learn)
    router = next(iter(trained.routers_of(model).values()))
    assert float(router.temperature()) == pytest.approx(0.37, abs=1e-9)
    assert (router.log_temperature is not None) == learn
    if learn:
        with torch.no_grad():
            router.log_temperature.fill_(-50)
        assert float(router.temperature()) == pytest.approx(0.01)


def test_a_mask_also_holds_in_training(folder: Path) -> None:
    model = composition("bert", folder, balance="log").train()
    with masked_experts(model, drop=["law"]):
        loss = model(**tiny.batch(model.get_base_model())).loss
    loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in tiny.gradients(model).values())


def trainer(model: nn.Module, given: dict[str, Tensor], folder: Path, **arguments: object) -> Trainer:
    rows = [{name: value[i] for name, value in given.items()} for i in range(3)] * 4
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=3, learning_rate=0.05, report_to=[],
        use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True, **arguments,
    )  # fmt: skip
    return Trainer(model=model, args=settings, train_dataset=rows)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_the_plain_trainer_trains_routers_and_leaves_all_else_bit_equal(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    model = trained.composition(kind, folder, double=False, sharp=False, balance="log")
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    trainer(model, tiny.batch(model.get_base_model()), tmp_path, gradient_accumulation_steps=2).train()
    changed = {
        name
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not torch.equal(tensor, before[name])
    }
    assert changed
    assert all("mole_router" in name for name in changed)
    assert any("mole_loras" in name for name in before)
    units = {layer.groups["default"].name for layer in trained.layers_of(model).values()}
    assert len({name.split(".lamella_mole_router")[0] for name in changed}) == len(units)
    given = tiny.inputs(model.get_base_model())
    model.eval()
    expected = trained.run(model, given)
    model.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(tiny.build(kind, layers=2), tmp_path / "out")
    assert torch.equal(trained.run(again, given), expected)


def test_it_learns_which_lora_a_task_needs(folder: Path, tmp_path: Path) -> None:
    """The labels are those of one LoRA: its weight grows where the composition can tell."""
    model = trained.composition("bert", folder, double=False, sharp=False)
    given = tiny.batch(model.get_base_model(), rows=16, seed=9)
    target = trained.alone("bert", trained.lora("bert", folder, 1), double=False)
    with torch.no_grad():
        wanted = target(**{k: v for k, v in given.items() if k != "labels"}).logits
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    inputs = {name: value for name, value in given.items() if name != "labels"}
    distances = []
    for _ in range(40):
        distance = (model.train()(**inputs).logits - wanted).square().mean()
        distance.backward()
        optimizer.step()
        optimizer.zero_grad()
        distances.append(float(distance))
    assert distances[-1] < 0.5 * distances[0]
