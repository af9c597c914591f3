"""Recomputed blocks see what they saw first, and their routers get the same gradient."""

import pytest
import torch
from tests import tiny
from torch import Tensor
from torch.nn.functional import logsigmoid

from lamella.routing import current_frame

MODES = {"none": None, "non-reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


def prepared(name: str, mode: str, **config: object):
    model = (
        tiny.adapted(tiny.MODELS[name]().double(), router_aux_loss_coef=0.5, router_z_loss_coef=0.1, **config)
        .double()
        .train()
    )
    if MODES[mode] is not None:
        model.gradient_checkpointing_enable(MODES[mode])
        model.enable_input_require_grads()  # reentrant checkpointing sees no parameters
        assert model.get_base_model().is_gradient_checkpointing
    return model


@pytest.mark.parametrize(
    ("name", "mode", "threshold"),  # the dense form up to the threshold; MPNet has no checkpointing in transformers
    [
        ("bert", "reentrant", 1), ("gpt2", "non-reentrant", 10**6), ("llama", "reentrant", 10**6),
        ("llama", "non-reentrant", 1), ("t5", "reentrant", 10**6), ("t5", "non-reentrant", 1),
    ],
)  # fmt: skip
def test_gradients_are_the_same_with_and_without(
    name: str, mode: str, threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamella.kernels.sorted.SORTED_ABOVE", threshold)
    results = []
    for each in ("none", mode):
        model = prepared(name, each, num_experts=4)
        runs = []
        block = next(layer for layer in model.modules() if isinstance(layer, tiny.MolaLinear))
        block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(current_frame().recomputing))
        # Scaled, so that a recomputed block must know the scale of the loss of its own call.
        (3 * model(**tiny.batch(model.get_base_model())).loss).backward()
        assert runs == ([False] if each == "none" else [False, True])
        results.append(tiny.gradients(model))
    assert any("router" in key for key in results[0])
    tiny.assert_same(results[1], results[0])


@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_the_balance_loss_is_what_is_compared(mode: str) -> None:
    with_balance, without = prepared("llama", mode), tiny.adapted(tiny.llama().double()).double().train()
    for model in (with_balance, without):
        model(**tiny.batch(model.get_base_model())).loss.backward()
    actual, plain = tiny.gradients(with_balance, "router"), tiny.gradients(without, "router")
    assert all((actual[key] - plain[key]).norm() > 0.1 * plain[key].norm() for key in plain)


def preference_loss(model: torch.nn.Module, chosen: dict[str, Tensor], rejected: dict[str, Tensor]) -> Tensor:
    """As DPO: two forwards, a loss from logits, one backward."""
    scores = []
    for given in (chosen, rejected):
        inputs = {key: value for key, value in given.items() if key != "labels"}
        logs = model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, given["input_ids"][:, 1:, None])[..., 0]
        scores.append((logs * given["attention_mask"][:, 1:]).sum(-1))
    return -logsigmoid(scores[0] - scores[1]).mean()


@pytest.mark.parametrize(("name", "mode"), [("llama", "reentrant"), ("gpt2", "non-reentrant")])
def test_two_forwards_before_one_backward_see_their_own_masks(name: str, mode: str) -> None:
    results = []
    for each in ("none", mode):
        model = prepared(name, each)
        base = model.get_base_model()
        chosen = tiny.batch(base, pad=4)
        rejected = tiny.batch(base, pad=1, seed=8)  # as long, so that a mixed-up mask would fit
        assert chosen["input_ids"].shape == rejected["input_ids"].shape
        with tiny.watch(model) as seen:
            preference_loss(model, chosen, rejected).backward()
        routers = sum(isinstance(layer, tiny.MolaLinear) for layer in model.modules())
        assert len(seen) == 2 * routers, "a recomputed token was counted twice"
        masks = [chosen["attention_mask"]] * routers + [rejected["attention_mask"]] * routers
        for (_, _, mask), expected in zip(seen, masks, strict=True):
            assert torch.equal(mask, expected.bool().flatten())
        results.append(tiny.gradients(model))
    tiny.assert_same(results[1], results[0])


def test_switching_checkpointing_on_and_off_and_on_again() -> None:
    model = prepared("llama", "reentrant")
    given = tiny.batch(model.get_base_model())
    model(**given).loss.backward()
    expected = tiny.gradients(model)
    for mode in ({"use_reentrant": False}, None, {"use_reentrant": True}):
        model.gradient_checkpointing_disable()
        if mode is not None:
            model.gradient_checkpointing_enable(mode)
        model(**given).loss.backward()
        tiny.assert_same(tiny.gradients(model), expected)
