"""A composed model is the sum written by hand, whatever decides and whatever the LoRAs adapt."""

from pathlib import Path

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from tests import tiny
from tests.reference import mole_model
from tests.tuners.mole import trained

from lamella import MoleConfig, compose, fixed_weights, masked_experts

BLOCK = ("attention.self.query", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense")
READ = ("attention.self.query", "attention.self.value")


def units(model: torch.nn.Module, granularity: str) -> list[mole_model.Unit]:
    """BERT's units as the method names them, with the routers' tensors. The pooler lies outside the blocks."""
    routers = trained.routers_of(model)

    def unit(name: str, members: list[str], readers: list[str]) -> mole_model.Unit:
        router = routers[name]
        e = None if router.e is None else router.e.detach().double()
        tau = float(torch.as_tensor(router.temperature()).detach())
        return mole_model.Unit(members, readers, e, router.bias.detach().double(), tau, router.scale)

    blocks = [f"bert.encoder.layer.{i}" for i in range(2)]
    if granularity == "matrix":
        return [unit(f"{b}.{m}", [f"{b}.{m}"], [f"{b}.{m}"]) for b in blocks for m in BLOCK]
    if granularity == "network":
        every = [f"{b}.{m}" for b in blocks for m in BLOCK]
        return [unit("bert.encoder.layer.network", every, trained.names_in(blocks[0], READ))]
    if granularity == "block":
        return [unit(b, trained.names_in(b, BLOCK), trained.names_in(b, READ)) for b in blocks]
    return [
        one
        for b in blocks
        for one in (
            unit(f"{b}.attention", trained.names_in(b, BLOCK[:3]), trained.names_in(b, READ)),
            unit(f"{b}.mlp", trained.names_in(b, BLOCK[3:]), [f"{b}.intermediate.dense"]),
        )
    ]


@pytest.mark.parametrize("router_input", ["mean", "token"])
@pytest.mark.parametrize("granularity", ["matrix", "sublayer", "block", "network"])
def test_every_granularity_is_the_sum_by_hand(granularity: str, router_input: str, folder: Path) -> None:
    config = {"granularity": granularity, "router_input": router_input, "temperature": 0.7}
    model = trained.composition("bert", folder, exclude_modules=["pooler.dense"], **config)
    given = tiny.inputs(model.get_base_model())
    loras = trained.deltas(model, "bert", folder)
    base = tiny.bert().double()
    read = given["attention_mask"].bool()
    with mole_model.composed(base, loras, units(model, granularity), read, router_input == "token") as decided:
        expected = trained.run(base, given)
    torch.testing.assert_close(trained.run(model, given), expected)
    assert not torch.allclose(expected, trained.run(base, given))
    flat = [weights.flatten(0, -2) for weights in decided.values()]
    assert all((weights.std(dim=0) > 1e-6).any() for weights in flat), "different inputs get different weights"


@pytest.mark.parametrize(
    ("kind", "granularity"),
    [
        ("bert", "block"),
        ("distilbert", "sublayer"),
        ("llama", "network"),
        ("llama", "matrix"),
        ("gpt2", "block"),
        ("t5", "network"),
        ("t5", "sublayer"),
    ],
)
def test_one_hot_is_that_lora_as_peft_runs_it(kind: str, granularity: str, folder: Path) -> None:
    model = trained.composition(kind, folder, granularity=granularity, sharp=False)
    given = tiny.inputs(model.get_base_model())
    outputs = []
    for index, name in enumerate(trained.NAMES):
        alone = trained.run(trained.alone(kind, trained.lora(kind, folder, index)), given)
        trained.one_hot(model, index)
        with tiny.watch(model) as seen:
            torch.testing.assert_close(trained.run(model, given), alone, rtol=1e-6, atol=1e-7)
        assert seen
        with fixed_weights(model, {name: 1}):
            torch.testing.assert_close(trained.run(model, given), alone, rtol=1e-6, atol=1e-7)
        outputs.append(alone)
    assert not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("kind", "router_input"), [("bert", "mean"), ("llama", "token"), ("gpt2", "mean"), ("t5", "token")]
)
def test_it_starts_as_normalised_linear_arithmetic(kind: str, router_input: str, folder: Path) -> None:
    model = trained.composition(kind, folder, sharp=False, router_input=router_input)
    given = tiny.inputs(model.get_base_model())
    base = tiny.build(kind, layers=2).double()
    with torch.no_grad():
        for name, own in trained.deltas(model, kind, folder).items():
            weight = base.get_submodule(name).weight
            for A, B, scaling in (lora for lora in own if lora is not None):
                delta = scaling * B @ A / 3
                weight += delta.t() if kind == "gpt2" else delta
    torch.testing.assert_close(trained.run(model, given), trained.run(base, given), rtol=1e-6, atol=1e-7)
    with fixed_weights(model, dict.fromkeys(trained.NAMES, 1 / 3)):
        torch.testing.assert_close(trained.run(model, given), trained.run(base, given), rtol=1e-6, atol=1e-7)
    weights = list(trained.weights_seen(model, given).values())
    assert all(torch.equal(own, torch.full_like(own, 1 / 3)) for own in weights)


@settings(max_examples=5, deadline=None)
@drawn(dropped=st.sets(st.integers(0, 2), min_size=1, max_size=2), router_input=st.sampled_from(["mean", "token"]))
def test_a_mask_shares_out_in_proportion(dropped: set[int], router_input: str, folder: Path) -> None:
    config = {"granularity": "network", "router_input": router_input, "exclude_modules": ["pooler.dense"]}
    model = trained.composition("bert", folder, **config)
    given = tiny.inputs(model.get_base_model())
    full = trained.weights_seen(model, given)
    with masked_experts(model, drop=[trained.NAMES[i] for i in dropped]):
        masked, outputs = trained.weights_seen(model, given), trained.run(model, given)
    place = "bert.encoder.layer", 0, "network"  # decides before the mask can have changed its input
    keep = torch.tensor([i not in dropped for i in range(3)]).double()
    expected = full[place] * keep / (full[place] * keep).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(masked[place], expected)
    base, loras, read = tiny.bert().double(), trained.deltas(model, "bert", folder), given["attention_mask"].bool()
    by_token = router_input == "token"
    with mole_model.composed(base, loras, units(model, "network"), read, by_token, dropped=sorted(dropped)):
        torch.testing.assert_close(outputs, trained.run(base, given))


@settings(max_examples=5, deadline=None)
@drawn(weights=st.lists(st.lists(st.floats(0, 3), min_size=3, max_size=3), min_size=3, max_size=3))
def test_each_request_of_a_batch_has_its_own_weights(weights: list[list[float]], folder: Path) -> None:
    model = trained.composition("bert", folder)
    given = tiny.inputs(model.get_base_model())
    by_name = [dict(zip(trained.NAMES, row, strict=True)) for row in weights]
    with fixed_weights(model, by_name):
        together = trained.run(model, given)
    with fixed_weights(model, torch.tensor(weights, dtype=torch.float64)):
        torch.testing.assert_close(trained.run(model, given), together)
    for row, own in enumerate(by_name):
        with fixed_weights(model, own):
            alone = trained.run(model, {name: value[row : row + 1] for name, value in given.items()})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "router_input"), [("bert", "mean"), ("bert", "flatten"), ("distilbert", "token")])
def test_batch_mates_padding_and_its_side_change_nothing(kind: str, router_input: str, folder: Path) -> None:
    length = 9 if router_input == "flatten" else None
    model = trained.composition(kind, folder, router_input=router_input, flatten_length=length)
    given = tiny.inputs(model.get_base_model())
    together = trained.run(model, given)
    for row in range(3):
        real = given["attention_mask"][row].bool()
        alone = {name: value[row : row + 1, real] for name, value in given.items()}
        torch.testing.assert_close(trained.run(model, alone), together[row : row + 1], rtol=1e-6, atol=1e-7)
        wide = {name: torch.nn.functional.pad(value, (0, 2)) for name, value in alone.items()}
        torch.testing.assert_close(trained.run(model, wide), together[row : row + 1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("router_input", ["mean", "token"])
def test_left_padding_changes_nothing_on_a_decoder(router_input: str, folder: Path) -> None:
    model = trained.composition("llama", folder, router_input=router_input)
    ids = torch.randint(3, tiny.VOCAB, (1, 6), generator=torch.Generator().manual_seed(2))
    alone = trained.run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (3, 0), value=tiny.PAD),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (3, 0)),
        "position_ids": torch.tensor([[0, 0, 0, *range(6)]]),
    }
    torch.testing.assert_close(trained.run(model, padded)[:, 3:], alone, rtol=1e-5, atol=1e-6)


def test_the_order_of_the_loras_is_the_order_they_were_given_in(folder: Path) -> None:
    paths = trained.loras("bert", folder)
    for order in (["law", "news", "code"], ["code", "law", "news"]):
        model = compose(tiny.bert().double(), {name: paths[name] for name in order}, MoleConfig(balance="none")).eval()
        given = tiny.inputs(model.get_base_model())
        trained.one_hot(model, order.index("code"))
        alone = trained.run(trained.alone("bert", paths["code"]), given)
        torch.testing.assert_close(trained.run(model, given), alone, rtol=1e-6, atol=1e-7)


def test_a_flattened_sequence_may_be_as_long_as_it_says_and_no_longer(folder: Path) -> None:
    model = trained.composition("bert", folder, router_input="flatten", flatten_length=7)
    given = tiny.inputs(model.get_base_model())
    assert given["input_ids"].shape[1] == 7
    trained.run(model, given)
    with pytest.raises(ValueError, match="8 tokens is longer than flatten_length=7"):
        trained.run(model, tiny.inputs(model.get_base_model(), tokens=8))
