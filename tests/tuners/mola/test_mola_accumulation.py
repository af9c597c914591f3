"""One batch and four copies of it accumulated are the same step, whatever normalises the loss."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tests import tiny
from torch import Tensor
from transformers import Trainer, TrainingArguments


def model_of(name: str) -> PeftModel:
    return tiny.adapted(tiny.MODELS[name]().double(), router_aux_loss_coef=0.5, router_z_loss_coef=0.1).double().train()


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_accumulating_without_num_items(name: str) -> None:
    model = model_of(name)
    given = tiny.batch(model.get_base_model())
    model(**given).loss.backward()
    expected = tiny.gradients(model)
    for _ in range(4):
        (model(**given).loss / 4).backward()
    tiny.assert_same(tiny.gradients(model), expected)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_accumulating_with_num_items(as_tensor: bool) -> None:
    model = model_of("llama")
    given = tiny.batch(model.get_base_model())
    model(**given).loss.backward()
    expected = tiny.gradients(model)
    total = 4 * given["labels"][:, 1:].ne(-100).sum()
    for _ in range(4):
        model(**given, num_items_in_batch=total if as_tensor else int(total)).loss.backward()
    tiny.assert_same(tiny.gradients(model), expected)


class Watched(Trainer):
    """Keeps the gradients of each optimiser step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[dict[str, Tensor]] = []

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        optimizer.register_step_pre_hook(
            lambda *_: self.steps.append({name: p.grad.clone() for name, p in trained if p.grad is not None})
        )
        return optimizer


def train(name: str, folder: str, copies: int, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of one SGD step over ``copies`` of one batch, and the parameters after it."""
    model = model_of(name)
    given = tiny.batch(model.get_base_model())
    rows = [{key: value[row].tolist() for key, value in given.items()} for row in range(3)] * copies
    arguments = TrainingArguments(
        folder, use_cpu=True, report_to=[], save_strategy="no", per_device_train_batch_size=3, max_steps=1,
        gradient_accumulation_steps=copies, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, disable_tqdm=True,
        remove_unused_columns=False, train_sampling_strategy="sequential", lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = Watched(model, arguments, train_dataset=Dataset.from_list(rows).with_format("torch"))
    trainer.train()
    assert len(trainer.steps) == 1
    return trainer.steps[0], {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", {}), ("gpt2", {"gradient_checkpointing": True})])
def test_the_trainer_accumulates_four_copies_into_the_step_of_one(name: str, checkpointing: dict, tmp_path) -> None:
    once, four = (train(name, str(tmp_path), copies, **checkpointing) for copies in (1, 4))
    assert any("router" in key for key in once[0])
    tiny.assert_same(four[0], once[0])
    tiny.assert_same(four[1], once[1])


def test_the_trainers_step_is_the_plain_one(tmp_path) -> None:
    gradients, _ = train("llama", str(tmp_path), copies=4)
    model = model_of("llama")
    model(**tiny.batch(model.get_base_model())).loss.backward()
    tiny.assert_same(gradients, tiny.gradients(model))


def smooth() -> PeftModel:
    """All experts are used, so that rounding cannot change who is chosen; the z-loss carries the scale."""
    return tiny.adapted(tiny.llama(), top_k=3, router_aux_loss_coef=0.5, router_z_loss_coef=0.5).train()


def test_fp16_with_a_gradient_scaler_gives_the_gradients_of_fp32() -> None:
    model = smooth()
    given = tiny.batch(model.get_base_model())
    model(**given).loss.backward()
    expected = tiny.gradients(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(2):
        with torch.autocast("cpu", torch.float16):
            loss = model(**given).loss
        scaler.scale(loss / 2).backward()
    scaler.unscale_(optimizer)
    actual = tiny.gradients(model)
    for name in expected:
        assert (actual[name] - expected[name]).norm() < 0.02 * expected[name].norm() + 1e-4, name
    assert any("router" in name for name in actual)


def test_bf16_autocast_is_close_to_fp32() -> None:
    model = smooth()
    given = tiny.batch(model.get_base_model())
    expected_loss = model(**given).loss
    expected_loss.backward()
    expected = tiny.gradients(model)
    with torch.autocast("cpu", torch.bfloat16), tiny.watch(model) as seen:
        loss = model(**given).loss
    loss.backward()
    assert all(routing.weights.dtype == torch.float32 for _, routing, _ in seen)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.02)
    actual = tiny.gradients(model)
    norm = sum(float(gradient.square().sum()) for gradient in expected.values()) ** 0.5
    apart = sum(float((actual[name] - expected[name]).square().sum()) for name in expected) ** 0.5
    assert apart < 0.1 * norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_keeps_its_dtype_and_trains(dtype: torch.dtype) -> None:
    model = tiny.adapted(tiny.llama().to(dtype), router_aux_loss_coef=0.5).train()
    output = model(**tiny.batch(model.get_base_model()))
    assert output.logits.dtype == dtype
    output.loss.backward()
    for name, gradient in tiny.gradients(model).items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
