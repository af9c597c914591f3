"""Whatever trainer builds the loss, the balance loss is the mean of the micro-batches', weighted as their task losses.

Each case trains with its trainer unchanged and a learning rate of 0. B is zero, so that what a router gets is the
balance loss as the trainer scaled it. It has to be the sum of the micro-batches' own balance gradients, computed one by
one, times the weights that the case writes down.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tests import tiny
from tests.tuners.mola.test_mola_trainers import QUIET, TEXTS, tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from lamella import MolaConfig
from lamella.routing import collect_losses, loss_scale

Gradients = dict[str, Tensor]
Weights = Callable[[list[dict[str, Any]]], Sequence[float]]
MakeTrainer = Callable[[PeftModel, dict[str, Any]], Trainer]


def mola(base: nn.Module) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(base, MolaConfig(r=2, num_experts=3, router_aux_loss_coef=5.0))


class Watch:
    """The calls with a graph of one optimiser step after another, and the routers' gradients of each step."""

    def __init__(self, model: PeftModel) -> None:
        self.model, self.calls, self.steps = model, [[]], []
        model.get_base_model().register_forward_pre_hook(self._call, with_kwargs=True)

    def _call(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self.calls[-1].append(dict(given))

    def step(self, *_: Any) -> None:
        self.steps.append(tiny.gradients(self.model, "router"))
        self.calls.append([])


def train(make: MakeTrainer, model: PeftModel, **options: Any) -> Watch:
    arguments = {"learning_rate": 0.0, "optim": "sgd", "max_grad_norm": 0.0, **QUIET, **options}
    torch.manual_seed(11)
    trainer = make(model, arguments)
    watch = Watch(trainer.model)
    trainer.create_optimizer().register_step_pre_hook(watch.step)
    trainer.train()
    return watch


def one_by_one(model: PeftModel, calls: list[dict[str, Any]], weights: Sequence[float]) -> Gradients:
    """The oracle: each call again by itself, its balance loss handed out."""
    assert len(calls) == len(weights)
    model.zero_grad()
    for given, weight in zip(calls, weights, strict=True):
        with collect_losses() as losses:
            model.train().get_base_model()(**given)
        (weight * losses.total()).backward()
    return tiny.gradients(model, "router")


def check(make: MakeTrainer, model: PeftModel, weights: Weights, **options: Any) -> list[int]:
    """Trains; returns how many calls each optimiser step had."""
    watch = train(make, model, **options)
    for calls, actual in zip(watch.calls, watch.steps, strict=False):
        expected = one_by_one(watch.model, calls, weights(calls))
        assert any(gradient.norm() > 1e-3 for gradient in expected.values())
        tiny.assert_same(actual, expected, rtol=1e-3, atol=1e-6)
    return [len(calls) for calls in watch.calls[:-1]]


def by_labels(shifts: bool = True) -> Weights:
    """A loss that is summed over the labels and divided by those of the step."""

    def weights(labels: list[Tensor]) -> list[float]:
        counts = [int((label[..., 1:] if shifts else label).ne(-100).sum()) for label in labels]
        return [count / sum(counts) for count in counts]

    return lambda calls: weights([call["labels"] for call in calls])


def alike(calls: list[dict[str, Any]]) -> list[float]:
    """A mean over each micro-batch, divided by their number."""
    return [1 / len(calls)] * len(calls)


# transformers' Trainer


def rows_of(base: nn.Module, count: int) -> Dataset:
    """Rows of which each has more labels than the one before."""
    given = tiny.batch(base, rows=count, tokens=8, pad=0)
    if given["labels"].dim() == 2:
        for row in range(count):
            given["labels"][row, 2 + row % 6 :] = -100
    return Dataset.from_list([{key: value[row].tolist() for key, value in given.items()} for row in range(count)])


def of_transformers(kind: type[Trainer] = Trainer, rows: int = 12, **options: Any) -> MakeTrainer:
    def make(model: PeftModel, arguments: dict[str, Any]) -> Trainer:
        data = rows_of(model.get_base_model(), rows).with_format("torch")
        settings = TrainingArguments("unused", train_sampling_strategy="sequential", **arguments)
        return kind(model, settings, train_dataset=data, **options)

    return make


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


class OwnMean(Trainer):
    """Takes the labels away and forms a mean, as its transformers asks: it says that the Trainer is to divide it."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **options: Any) -> Tensor:
        labels = inputs.pop("labels")
        return cross_entropy(model(**inputs)["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class OwnSum(OwnMean):
    loss_is_scaled_for_ga = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        labels = inputs.pop("labels")
        return summed(model(**inputs), labels, num_items_in_batch)


def labels_of_rows(rows: int, batch: int, base: Callable[[], nn.Module], shifts: bool) -> Weights:
    """Where the labels never reach the model, they are those of the data."""
    labels = torch.tensor(rows_of(base(), rows)["labels"])
    batches = iter(labels.split(batch))
    return lambda calls: by_labels(shifts)([{"labels": label} for label in itertools.islice(batches, len(calls))])


CASES = ("label smoothing", "compute_loss_func", "own mean", "own sum", "classifier", "checkpointing")
QUICK = {("label smoothing", 4), ("own mean", 8), ("classifier", 4)}


@pytest.mark.parametrize(
    ("case", "steps"),
    [
        pytest.param(case, steps, marks=() if (case, steps) in QUICK else pytest.mark.heavy)
        for case in CASES
        for steps in (1, 4, 8)
    ],
)
def test_transformers_trainer(case: str, steps: int) -> None:
    """The last optimiser step has fewer micro-batches than the others."""
    base = tiny.bert if case == "classifier" else tiny.llama
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": steps}
    if case in ("label smoothing", "classifier", "checkpointing"):
        options["label_smoothing_factor"] = 0.1
    if case == "checkpointing":
        options["gradient_checkpointing"] = True
    rows = {1: 4, 4: 12, 8: 20}[steps]
    make = {
        "compute_loss_func": of_transformers(rows=rows, compute_loss_func=summed),
        "own mean": of_transformers(OwnMean, rows),
        "own sum": of_transformers(OwnSum, rows),
    }.get(case, of_transformers(rows=rows))
    weights = alike if case == "own mean" else labels_of_rows(rows, 2, base, shifts=case != "classifier")
    calls = check(make, mola(base(layers=1)), weights, num_train_epochs=1, **options)
    assert calls == {1: [1, 1], 4: [4, 2], 8: [8, 2]}[steps]


def test_micro_batches_alike_make_the_step_of_one() -> None:
    steps = []
    for copies in (1, 4):
        model = mola(tiny.llama(layers=1))
        data = Dataset.from_list([*rows_of(model.get_base_model(), 2)] * copies).with_format("torch")

        def make(model: PeftModel, arguments: dict[str, Any], data: Dataset = data) -> Trainer:
            settings = TrainingArguments("unused", train_sampling_strategy="sequential", **arguments)
            return Trainer(model, settings, train_dataset=data)

        accumulating = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": copies, "max_steps": 1}
        steps += train(make, model, label_smoothing_factor=0.1, **accumulating).steps
    tiny.assert_same(*steps, rtol=1e-4, atol=1e-6)


def test_a_gradient_scaler_scales_the_balance_loss_too() -> None:
    """As with fp16, here without a device for it; the optimiser unscales what both have given."""

    def make(model: PeftModel, arguments: dict[str, Any]) -> Trainer:
        trainer = of_transformers()(model, arguments)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return trainer

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "label_smoothing_factor": 0.1}
    weights = labels_of_rows(12, 2, tiny.llama, shifts=True)
    check(make, mola(tiny.llama(layers=1)), weights, max_steps=1, **options)


def test_a_loss_of_the_model_keeps_the_scale_that_arrives_beside_one_built_outside() -> None:
    class Both(Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **options: Any) -> Tensor:
            return 3 * model(**inputs)["loss"] + model(**inputs)["logits"].square().mean()

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    weights = [3 / 2, 1 / 2, 3 / 2, 1 / 2]
    check(of_transformers(Both, 4), mola(tiny.llama(layers=1)), lambda calls: weights, **options)


# TRL


def text(model: PeftModel, arguments: dict[str, Any]) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"text": TEXTS[:6]})
    settings = SFTConfig("unused", max_length=16, **arguments)
    return SFTTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer())


def smoothed_text(model: PeftModel, arguments: dict[str, Any]) -> Trainer:
    return text(model, {**arguments, "label_smoothing_factor": 0.1})


def pairs(model: PeftModel, arguments: dict[str, Any]) -> Trainer:
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list([{"prompt": text, "chosen": "w1 w2", "rejected": "w3"} for text in TEXTS[:6]])
    settings = DPOConfig("unused", max_length=32, **arguments)
    return DPOTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer())


def judgements(model: PeftModel, arguments: dict[str, Any]) -> Trainer:
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": text, "completion": f"w{i} w2", "label": i % 2 == 0} for i, text in enumerate(TEXTS[:6])]
    settings = KTOConfig("unused", max_length=32, **{**arguments, "per_device_train_batch_size": 2})
    return KTOTrainer(model, args=settings, train_dataset=Dataset.from_list(rows * 2), processing_class=tokenizer())


def rewards(model: PeftModel, arguments: dict[str, Any]) -> Trainer:
    from trl import RewardConfig, RewardTrainer

    rows = Dataset.from_list([{"chosen": f"{text} w1", "rejected": f"{text} w3 w4"} for text in TEXTS[:6]])
    settings = RewardConfig("unused", max_length=32, **arguments)
    return RewardTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer())


def generations(loss_type: str) -> MakeTrainer:
    def make(model: PeftModel, arguments: dict[str, Any]) -> Trainer:
        from trl import GRPOConfig, GRPOTrainer

        settings = GRPOConfig(
            "unused", max_completion_length=6, num_generations=2, loss_type=loss_type,
            **{**arguments, "per_device_train_batch_size": 2},
        )  # fmt: skip
        return GRPOTrainer(
            model, reward_funcs=lambda completions, **_: [float(len(text)) for text in completions], args=settings,
            train_dataset=Dataset.from_dict({"prompt": TEXTS * 2}), processing_class=tokenizer(),
        )  # fmt: skip

    return make


def rewarded(model: PeftModel, arguments: dict[str, Any]) -> Trainer:
    from trl import RLOOConfig, RLOOTrainer

    settings = RLOOConfig(
        "unused", max_completion_length=6, num_generations=2, **{**arguments, "per_device_train_batch_size": 2}
    )
    return RLOOTrainer(
        model, reward_funcs=lambda completions, **_: [float(len(text)) for text in completions], args=settings,
        train_dataset=Dataset.from_dict({"prompt": TEXTS * 2}), processing_class=tokenizer(),
    )  # fmt: skip


TRAINERS: dict[str, tuple[MakeTrainer, Weights]] = {
    "SFT": (text, by_labels()),
    "DPO": (pairs, alike),
    "KTO": (judgements, alike),
    "Reward": (rewards, alike),
    "GRPO": (generations("grpo"), alike),
    "RLOO": (rewarded, alike),
}


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param(name, steps, marks=() if (name, steps) in {("SFT", 4), ("DPO", 4)} else pytest.mark.heavy)
        for name in TRAINERS
        for steps in (1, 4, 8)
    ],
)
def test_trl(name: str, steps: int) -> None:
    make, weights = TRAINERS[name]
    one = tiny.llama_config(layers=1)
    one.num_labels = 1
    model = mola(AutoModelForSequenceClassification.from_config(one) if name == "Reward" else tiny.llama(layers=1))
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps, "bf16": False}
    calls = check(make, model, weights, num_train_epochs=1, gradient_checkpointing=name == "DPO", **options)
    assert max(calls) == (min(steps, 6) if name in ("SFT", "DPO", "KTO", "Reward") else steps)


# Loops by hand


def outside(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    return summed(model(input_ids=batch["input_ids"]), batch["labels"], batch["labels"][:, 1:].ne(-100).sum())


def test_a_loop_with_accelerate_accumulates() -> None:
    model = mola(tiny.llama(layers=1)).train()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    data = DataLoader(rows_of(model.get_base_model(), 6).with_format("torch"), batch_size=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    prepared, optimizer, data = accelerator.prepare(model, optimizer, data)
    watch = Watch(model)
    optimizer.optimizer.register_step_pre_hook(watch.step)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for batch in data:
            with accelerator.accumulate(prepared):
                accelerator.backward(outside(prepared, batch))
                optimizer.step()
                optimizer.zero_grad()
    assert [len(calls) for calls in watch.calls] == [4, 2, 0]
    for calls, actual in zip(watch.calls, watch.steps, strict=False):
        tiny.assert_same(actual, one_by_one(model, calls, [1 / 4] * len(calls)), rtol=1e-3, atol=1e-6)
    GradientState._reset_state()


def test_what_nobody_says_is_said_once_with_the_way_out() -> None:
    model = mola(tiny.llama(layers=1)).train()
    batch = tiny.batch(model.get_base_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**batch).loss.backward()
        model.eval()
        outside(model, batch).backward()
        model.train()
        with loss_scale(model, 1 / 4):
            (outside(model, batch) / 4).backward()
    with pytest.warns(UserWarning, match=r"attached with scale 1.*lamella\.routing\.loss_scale\(model, 1 / steps\)"):
        outside(model, batch).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        outside(model, batch).backward()
