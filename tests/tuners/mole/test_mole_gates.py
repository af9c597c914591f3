"""Gates that need not sum to 1: what they compute, in each combination with the other settings, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from peft import PeftModel
from tests import tiny
from tests.reference import mole_model
from tests.tuners.mole import trained
from tests.tuners.mole.test_mole_arithmetic import units

import lamella
from lamella import LamellaError, MoleConfig, compose, fixed_weights, masked_experts, record_routing
from lamella.routing import mixing_weights

GATES = {"score": "sigmoid"}
SUM = dict.fromkeys(trained.NAMES, 1.0)


@settings(max_examples=25, deadline=None)
@drawn(st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5), st.integers(1, 5))
def test_the_k_largest_gates_stay_as_they_are(values: list[float], k: int) -> None:
    smallest = sorted(values)[-k]
    expected = [2 / (1 + math.exp(-value)) if value >= smallest else 0.0 for value in values]
    actual = mixing_weights(torch.tensor(values, dtype=torch.float64), k, "sigmoid")
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("granularity", "router_input"),
    [("matrix", "token"), ("sublayer", "mean"), ("block", "token"), ("network", "mean")],
)
def test_it_is_the_sum_by_hand_with_loras_left_out_too(granularity: str, router_input: str, folder: Path) -> None:
    config = {"granularity": granularity, "router_input": router_input, "temperature": 0.7, **GATES}
    model = trained.composition("bert", folder, exclude_modules=["pooler.dense"], **config)
    given, loras = tiny.inputs(model.get_base_model()), trained.deltas(model, "bert", folder)
    base, read = tiny.bert().double(), given["attention_mask"].bool()
    gates = units(model, granularity)
    for unit in gates:
        unit.score = "sigmoid"
    for dropped in ([], [1]):
        with mole_model.composed(base, loras, gates, read, router_input == "token", dropped=dropped) as decided:
            expected = trained.run(base, given)
        with masked_experts(model, drop=[trained.NAMES[i] for i in dropped]):
            torch.testing.assert_close(trained.run(model, given), expected)
        sums = torch.cat([weights.sum(dim=-1).flatten() for weights in decided.values()])
        assert sums.std() > 1e-3, "they need not sum to 1"


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("bert", {"router_input": "flatten", "flatten_length": 7}),
        ("llama", {"granularity": "network", "prompt_tokens": 2}),
        ("t5", {"router_input": "token", "top_k": 1}),
        ("bert", {"router": "shared", "top_k": 2}),
        ("llama", {"shortlist": 3}),
        ("bert", {"form": "block-delta", "exclude_modules": ["pooler.dense"]}),
    ],
)
def test_it_starts_at_the_sum(kind: str, more: dict[str, object], folder: Path) -> None:
    """Also what runs without a decision, and where a gate for each of few LoRAs is all there is."""
    model = trained.composition(kind, folder, sharp=False, **GATES, **more)
    given = tiny.inputs(model.get_base_model())
    with torch.no_grad():
        started = model(**given).logits  # on a decoder nothing tells the prompt
        if more.get("form") == "block-delta":
            expected = _sum_of_blocks(kind, folder, given)
        else:
            plain = trained.composition(kind, folder, sharp=False)
            with fixed_weights(plain, SUM):
                expected = plain(**given).logits
    torch.testing.assert_close(started, expected, rtol=1e-5, atol=1e-6)


def _sum_of_blocks(kind: str, folder: Path, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What each LoRA changes of a block's output, added up."""
    plain = trained.composition(kind, folder, sharp=False, form="block-delta", exclude_modules=["pooler.dense"])
    with fixed_weights(plain, SUM):
        return plain(**given).logits


def test_one_open_gate_alone_is_twice_that_lora_and_closed_ones_add_nothing(folder: Path) -> None:
    model = trained.composition("bert", folder, **GATES)
    given = tiny.inputs(model.get_base_model())
    trained.one_hot(model, 1)
    with fixed_weights(model, {"code": 2.0}):
        twice = trained.run(model, given)
    torch.testing.assert_close(trained.run(model, given), twice)


def test_the_trace_and_the_doctor_see_gates(folder: Path) -> None:
    model = trained.composition("bert", folder, sharp=False, router_input="token", **GATES)
    given = tiny.inputs(model.get_base_model())
    with record_routing(model) as trace:
        trained.run(model, given)
    assert trace.frame.mean_weight.tolist() == pytest.approx([1.0] * len(trace.frame))
    assert trace.frame.entropy.tolist() == pytest.approx([math.log(3)] * len(trace.frame)), "of the gates' shares"
    assert trace.frame.effective_experts.tolist() == pytest.approx([3.0] * len(trace.frame))
    with torch.no_grad():
        for router in trained.routers_of(model).values():
            router.bias.copy_(torch.tensor([-5.0, -5.0, -12.0]))  # all are nearly closed, one of them more
    said = str(lamella.doctor(model, batches=[given] * 8))
    assert "1 of 3 LoRAs get less than 5% of an even share" in said
    assert "law" in said


def test_untrained_gates_collapse_to_the_sum_exactly(folder: Path) -> None:
    model = trained.composition("llama", folder, sharp=False, double=False, **GATES)
    given = tiny.inputs(model.get_base_model())
    collapsed = lamella.collapse(model, [given]).model
    torch.testing.assert_close(trained.run(collapsed, given), trained.run(model, given), rtol=1e-3, atol=1e-4)


def test_saved_and_loaded_it_is_bit_equal_and_what_was_saved_before_has_a_softmax(folder: Path, tmp_path: Path) -> None:
    model = trained.composition("bert", folder, double=False, **GATES)
    given = tiny.inputs(model.get_base_model())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.bert(), tmp_path)
    assert torch.equal(trained.run(again, given), trained.run(model, given))
    assert "gates from 0 to 2" in str(again.base_model.summary())
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    del values["score"]
    file.write_text(json.dumps(values | {"lamella_version": "0.2.0.dev3"}))
    assert MoleConfig.from_pretrained(tmp_path).score == "softmax"


def test_what_is_for_weights_that_sum_to_1_is_refused(folder: Path) -> None:
    assert MoleConfig(score="sigmoid").balance == "none"
    for wrong in ({"balance": "entropy"}, {"balance": "switch"}, {"form": "published"}):
        (name,) = wrong
        with pytest.raises(LamellaError, match=rf"{name}=.*sum to 1, and score='sigmoid'.*Leave {name} out"):
            MoleConfig(score="sigmoid", **wrong)
    with pytest.raises(LamellaError, match="score='gates' must be"):
        compose(tiny.bert(), trained.loras("bert", folder), MoleConfig(score="gates"))
