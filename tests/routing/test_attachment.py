"""A layer's own loss reaches the routers with the scale of the task loss, however the trainer builds it."""

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from tests import tiny
from torch import Tensor
from torch.nn.functional import cross_entropy

from lamella import LamellaError
from lamella.routing import collect_losses, find_tracker, loss_scale

BALANCE = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.01}


def model_and_batch(name: str, **config: float) -> tuple[PeftModel, dict[str, Tensor]]:
    model = tiny.adapted(tiny.MODELS[name]().double(), **{**BALANCE, **config}).double().train()
    return model, tiny.batch(model.get_base_model())


def explicit(
    model: PeftModel, given: dict[str, Tensor], loss_of: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """The oracle: the losses are handed out and added by plain arithmetic, ``loss_of(task, own)``."""
    with collect_losses() as collected:
        task = model(**given).loss
    loss_of(task, collected.total()).backward()
    return tiny.gradients(model)


@pytest.mark.parametrize(("name", "scale"), [("bert", 1.0), ("llama", 0.25), ("gpt2", 1024.0), ("t5", 0.25)])
def test_the_attached_gradient_carries_the_scale_of_the_task_loss(name: str, scale: float) -> None:
    model, given = model_and_batch(name)
    (model(**given).loss * scale).backward()
    actual = tiny.gradients(model)
    tiny.assert_same(actual, explicit(model, given, lambda task, own: scale * (task + own)))
    without, _ = model_and_batch(name, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    (without(**given).loss * scale).backward()
    plain = tiny.gradients(without, "router")
    assert all(not torch.allclose(actual[router], plain[router], rtol=1e-3) for router in plain)


def test_scaling_the_loss_in_place_is_seen_too() -> None:
    model, given = model_and_batch("llama")
    loss = model(**given).loss
    loss *= 3.0
    loss.backward()
    tiny.assert_same(tiny.gradients(model), explicit(model, given, lambda task, own: 3 * (task + own)))


def test_a_tuple_output_is_as_good() -> None:
    model, given = model_and_batch("bert")
    (model(**given, return_dict=False)[0] * 7).backward()
    tiny.assert_same(tiny.gradients(model), explicit(model, given, lambda task, own: 7 * (task + own)))


def test_num_items_in_batch_gives_this_batch_its_share_of_the_labels() -> None:
    model, given = model_and_batch("llama")
    here = given["labels"][:, 1:].ne(-100).sum()  # the first token of a row predicts nothing
    total = here + 11
    model(**given, num_items_in_batch=total).loss.backward()
    actual = tiny.gradients(model)
    given["num_items_in_batch"] = total
    tiny.assert_same(actual, explicit(model, given, lambda task, own: task + here / total * own))
    shifted = torch.nn.functional.pad(given["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    shifted[:, 0] = -100  # what a collator says counts before the labels do
    given["shift_labels"] = shifted
    model.zero_grad()
    model(**given).loss.backward()
    actual = tiny.gradients(model)
    here = shifted.ne(-100).sum()
    tiny.assert_same(actual, explicit(model, given, lambda task, own: task + here / total * own))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_labels_are_counted_as_the_trainer_counts_them(name: str, tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    model, _ = model_and_batch(name)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    tracker = find_tracker(model)
    assert tracker is not None
    assert tracker.shifts_labels == trainer._loss_shifts_labels


def loss_from_logits(model: PeftModel, given: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in given.items() if name != "labels"}
    return cross_entropy(model(**inputs).logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten())


def test_a_loss_built_from_logits_carries_the_balance_loss_too() -> None:
    model, given = model_and_batch("llama")
    loss_from_logits(model, given).backward()
    tiny.assert_same(tiny.gradients(model), explicit(model, given, lambda task, own: task + own))


def test_loss_scale_states_the_scale_of_such_a_loss() -> None:
    model, given = model_and_batch("llama")
    with loss_scale(model, 8.0):
        (loss_from_logits(model, given) * 8.0).backward()
    tiny.assert_same(tiny.gradients(model), explicit(model, given, lambda task, own: 8 * (task + own)))
    # and it is forgotten with the context
    loss_from_logits(model, given).backward()
    tiny.assert_same(tiny.gradients(model), explicit(model, given, lambda task, own: task + own))


def test_scales_that_end_in_another_order_than_they_began_leave_nothing() -> None:
    model, given = model_and_batch("llama")
    first, second = loss_scale(model, 3.0), loss_scale(model, 8.0)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    (loss_from_logits(model, given) * 8.0).backward()
    tiny.assert_same(tiny.gradients(model), explicit(model, given, lambda task, own: 8 * (task + own)))
    second.__exit__(None, None, None)
    loss_from_logits(model, given).backward()
    tiny.assert_same(tiny.gradients(model), explicit(model, given, lambda task, own: task + own))


def test_loss_scale_needs_an_adapter() -> None:
    with pytest.raises(LamellaError, match="LlamaForCausalLM has no lamella adapter"), loss_scale(tiny.llama(), 1.0):
        pass


def test_two_models_with_losses_of_their_own_do_not_mix() -> None:
    model, given = model_and_batch("llama")
    other, _ = model_and_batch("llama")
    loss, reference = model(**given).loss, other(**given).loss
    (2 * loss + 5 * reference).backward()
    tiny.assert_same(tiny.gradients(model), explicit(model, given, lambda task, own: 2 * (task + own)))
    tiny.assert_same(tiny.gradients(other), explicit(other, given, lambda task, own: 5 * (task + own)))


def test_two_forwards_before_one_backward_keep_their_own_scales() -> None:
    model, given = model_and_batch("llama")
    second = tiny.batch(model.get_base_model(), rows=2, tokens=5, seed=9)
    (2 * model(**given).loss + 5 * model(**second).loss).backward()
    actual = tiny.gradients(model)
    one = explicit(model, given, lambda task, own: 2 * (task + own))
    two = explicit(model, second, lambda task, own: 5 * (task + own))
    tiny.assert_same(actual, {name: one[name] + two[name] for name in one})


def test_in_eval_nothing_is_attached() -> None:
    model, given = model_and_batch("llama")
    without, _ = model_and_batch("llama", router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    for each in (model, without):
        each.eval()(**given).loss.backward()
    tiny.assert_same(tiny.gradients(model), tiny.gradients(without), rtol=0, atol=0)


def test_a_frozen_router_attaches_nothing() -> None:
    model, given = model_and_batch("llama")
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.requires_grad_(False)
    with collect_losses() as collected:
        model(**given)
    assert not collected.by_name


def half(model: PeftModel, given: dict[str, Tensor], labels: bool) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return model(**given).loss if labels else loss_from_logits(model, given)


def test_fp16_without_a_known_scale_is_refused() -> None:
    model = tiny.adapted(tiny.llama(), **BALANCE).train()
    given = tiny.batch(model.get_base_model())
    with pytest.raises(LamellaError, match=r"fp16.*labels.*loss_scale.*bf16.*router_aux_loss_coef=0"):
        half(model, given, labels=False).backward()


def test_fp16_with_a_known_scale_or_without_a_balance_loss_is_fine() -> None:
    given = tiny.batch(tiny.llama())
    half(tiny.adapted(tiny.llama(), **BALANCE).train(), given, labels=True).backward()
    half(tiny.adapted(tiny.llama()).train(), given, labels=False).backward()
    model = tiny.adapted(tiny.llama(), **BALANCE).train()
    with loss_scale(model, 2.0):
        (2 * half(model, given, labels=False)).backward()


def test_collecting_outside_training_says_what_to_do() -> None:
    model, given = model_and_batch("llama")
    with collect_losses() as collected, torch.no_grad():
        model(**given)
    with pytest.raises(LamellaError, match="No balance loss was collected"):
        collected.total()


def test_collected_losses_are_named_by_module() -> None:
    model, given = model_and_batch("t5")
    with collect_losses() as collected:
        model(**given)
    names = [name for name, _ in collected.by_name]
    assert len(names) == len(set(names)) == 2 * 7 + 2 * 11
    base = model.get_base_model()
    assert all(isinstance(base.get_submodule(name), tiny.MolaLinear) for name in names)


def test_collecting_through_non_reentrant_checkpointing_is_right() -> None:
    model, given = model_and_batch("llama")
    expected = explicit(model, given, lambda task, own: task + own)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = explicit(model, given, lambda task, own: task + own)
    tiny.assert_same(actual, expected)


def test_collecting_through_reentrant_checkpointing_is_refused() -> None:
    model, given = model_and_batch("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(LamellaError, match="reentrant"), collect_losses():
        model(**given)
