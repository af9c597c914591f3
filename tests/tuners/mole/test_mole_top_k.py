"""Only the k LoRAs with the largest weights are used: what that computes, what it spares, and what it costs."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from peft import PeftModel
from tests import tiny
from tests.tuners.mole import trained

import lamella
from lamella import LamellaError, MoleConfig, fixed_weights, masked_experts, record_routing
from lamella.routing import collect_losses, mixing_weights
from lamella.tuners.mole import layer as layers

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6)


@settings(max_examples=25, deadline=None)
@drawn(LOGITS, st.integers(1, 6))
def test_the_weights_are_the_softmax_over_the_k_largest(values: list[float], k: int) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    smallest = sorted(values)[-k]
    expected = [torch.exp(torch.tensor(value, dtype=torch.float64)) * (value >= smallest) for value in values]
    actual = mixing_weights(logits, k)
    torch.testing.assert_close(actual, torch.stack(expected) / sum(expected))
    assert torch.equal(mixing_weights(logits, 6), torch.softmax(logits, dim=-1))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(k))
    torch.testing.assert_close(mixing_weights(logits[order], k), actual[order])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_what_is_not_used_gets_no_gradient_and_a_single_one_that_of_its_probability(k: int) -> None:
    logits = torch.tensor([0.3, 2.0, -torch.inf, 1.0], dtype=torch.float64, requires_grad=True)
    effect = torch.tensor([0.7, -1.1, 5.0, 0.4], dtype=torch.float64)
    weights = mixing_weights(logits, k)
    (actual,) = torch.autograd.grad(weights @ effect, logits)
    if k == 1:
        assert torch.equal(weights, torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64))
        chances = torch.softmax(logits.detach(), dim=-1)
        expected = -1.1 * (torch.tensor([0.0, 1.0, 0.0, 0.0]) - chances)
        torch.testing.assert_close(actual, expected)
    else:
        w = weights.detach()
        torch.testing.assert_close(actual, w * (effect - w @ effect))
        assert bool((actual[w == 0] == 0).all())


@pytest.mark.parametrize(
    ("granularity", "router_input"),
    [("matrix", "token"), ("sublayer", "mean"), ("block", "flatten"), ("network", "mean"), ("network", "token")],
)
def test_all_k_is_none_bit_for_bit(granularity: str, router_input: str, folder: Path) -> None:
    config = {
        "granularity": granularity, "router_input": router_input, "balance": "log",
        "flatten_length": 9 if router_input == "flatten" else None, "exclude_modules": ["pooler.dense"],
    }  # fmt: skip
    actual = []
    for top_k in (None, 3):
        model = trained.composition("bert", folder, top_k=top_k, **config)
        logits = trained.run(model, tiny.inputs(model.get_base_model()))
        model.train()(**tiny.batch(model.get_base_model())).loss.backward()
        actual.append((logits, tiny.gradients(model)))
    (plain, expected), (used, gradients) = actual
    assert torch.equal(used, plain)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize(
    ("granularity", "router_input", "kind"),
    [("matrix", "token", "bert"), ("sublayer", "mean", "t5"), ("block", "token", "llama"), ("network", "mean", "bert")],
)
def test_every_router_gives_k_their_share(granularity: str, router_input: str, kind: str, folder: Path) -> None:
    for top_k in (1, 2):
        model = trained.composition(kind, folder, top_k=top_k, granularity=granularity, router_input=router_input)
        weights = trained.weights_seen(model, tiny.inputs(model.get_base_model()))
        assert len(weights) == len(trained.routers_of(model))
        for own in weights.values():
            assert set(own.gt(0).sum(dim=-1).tolist()) == {top_k}
            torch.testing.assert_close(own.sum(dim=-1), torch.ones_like(own[:, 0]))


@pytest.mark.parametrize("router_input", ["mean", "token"])
def test_one_is_the_best_lora_as_peft_runs_it(router_input: str, folder: Path) -> None:
    model = trained.composition("bert", folder, top_k=1, router_input=router_input)
    given = tiny.inputs(model.get_base_model())
    for index in range(3):
        with torch.no_grad():
            for router in trained.routers_of(model).values():
                router.e.zero_() if router.e is not None else None
                router.bias.copy_(torch.zeros(3).index_fill(0, torch.tensor(index), 0.01))
        alone = trained.run(trained.alone("bert", trained.lora("bert", folder, index)), given)
        torch.testing.assert_close(trained.run(model, given), alone, rtol=1e-6, atol=1e-7)


def test_untrained_routers_weigh_all_alike(folder: Path) -> None:
    model = trained.composition("bert", folder, top_k=1, sharp=False)
    given = tiny.inputs(model.get_base_model())
    for own in trained.weights_seen(model, given).values():
        assert torch.equal(own, torch.full_like(own, 1 / 3))
    with record_routing(model) as trace:
        trained.run(model, given)
    assert trace.frame.share.tolist() == pytest.approx([1 / 3] * len(trace.frame))


@pytest.mark.parametrize("router_input", ["mean", "token"])
def test_of_those_that_a_mask_leaves_k_are_used(router_input: str, folder: Path) -> None:
    config = {"granularity": "network", "router_input": router_input, "exclude_modules": ["pooler.dense"]}
    model = trained.composition("bert", folder, **config)
    one = trained.composition("bert", folder, top_k=1, **config)
    given = tiny.inputs(model.get_base_model())
    place = "bert.encoder.layer", 0, "network"
    with masked_experts(model, drop=["code"]):
        full = trained.weights_seen(model, given)[place]
    with masked_experts(one, drop=["code"]):
        own = trained.weights_seen(one, given)[place]
    assert torch.equal(own.argmax(dim=-1), full.argmax(dim=-1))
    assert torch.equal(own.max(dim=-1).values, torch.ones_like(own[:, 0]))
    two = trained.composition("bert", folder, top_k=2, **config)
    with masked_experts(two, drop=["code", "law"]):  # fewer are left than could be used
        assert set(trained.weights_seen(two, given)[place][:, 0].tolist()) == {1.0}


def test_the_trace_counts_what_is_used(folder: Path) -> None:
    model = trained.composition("bert", folder, top_k=1)
    given = tiny.inputs(model.get_base_model())
    weights = trained.weights_seen(model, given)
    with record_routing(model) as trace:
        trained.run(model, given)
    for (stack, layer, module), own in weights.items():
        frame = trace.frame
        rows = frame[(frame["stack"] == stack) & (frame.layer == layer) & (frame.module == module)]
        assert rows.share.tolist() == pytest.approx(own.mean(dim=0).tolist())
        assert rows.mean_weight.tolist() == pytest.approx(own.mean(dim=0).tolist())
        assert rows.num_experts.tolist() == [3, 3, 3]
        assert rows.entropy.iloc[0] > 0, "of all K: how sure the router is"


def test_the_balance_loss_sees_all(folder: Path) -> None:
    losses, config = [], {"granularity": "network", "balance": "entropy"}
    for top_k in (None, 1):
        model = trained.composition("bert", folder, top_k=top_k, exclude_modules=["pooler.dense"], **config).train()
        with collect_losses() as collected:
            model(**tiny.batch(model.get_base_model()))
        losses.append(float(collected.total().detach()))
    assert losses[0] == losses[1] != 0


def test_error_falls_with_k(tmp_path: Path) -> None:
    """Against all K, on random LoRAs."""
    paths = {f"lora{i}": trained.random_lora(tmp_path, i) for i in range(8)}
    model = lamella.compose(tiny.bert().double(), paths, MoleConfig(balance="none", granularity="matrix")).eval()
    trained.sharpen(model)
    given = tiny.inputs(model.get_base_model())
    everything = trained.run(model, given)
    with model.disable_adapter():
        effect = (trained.run(model, given) - everything).norm()
    errors = []
    for top_k in (1, 2, 4, 6, 8):
        for layer in trained.layers_of(model).values():
            layer.groups["default"].config.top_k = top_k
        errors.append(float((trained.run(model, given) - everything).norm() / effect))
    assert all(more > fewer for more, fewer in itertools.pairwise(errors)), errors
    assert errors[-1] == 0


def test_loras_that_no_sequence_uses_are_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {f"lora{i}": trained.random_lora(tmp_path, i) for i in range(16)}
    model = lamella.compose(tiny.bert(), paths, MoleConfig(balance="none", top_k=2)).eval()
    trained.sharpen(model, 8.0)
    given = tiny.inputs(model.get_base_model())
    computed: list[int] = []
    forward = layers.forward_frozen

    def counting(base, plain, x, weights, loras, h=None):
        computed.append(len(loras.ranks))
        return forward(base, plain, x, weights, loras, h)

    monkeypatch.setattr(layers, "forward_frozen", counting)
    spared = trained.run(model, given)
    assert max(computed) <= 2 * len(given["input_ids"]) < 16
    monkeypatch.setattr(layers, "leave_out_unused", lambda weights, loras: (weights, loras))
    torch.testing.assert_close(trained.run(model, given), spared)
    assert computed[-1] == 16


def test_fixed_weights_are_used_as_they_are(folder: Path) -> None:
    model, plain = (trained.composition("bert", folder, top_k=top_k) for top_k in (1, None))
    given = tiny.inputs(model.get_base_model())
    for rows in ([{"news": 0.5, "law": 0.5}, {"code": 1.0}, {"news": 0.2}], [{}, {}, {}], [{"law": 2.0}] * 3):
        with fixed_weights(model, rows), fixed_weights(plain, rows):
            assert torch.equal(trained.run(model, given), trained.run(plain, given))
        one = {name: value[:1] for name, value in given.items()}  # few enough rows to leave LoRAs out
        with fixed_weights(model, rows[:1]), fixed_weights(plain, rows[:1]):
            torch.testing.assert_close(trained.run(model, one), trained.run(plain, one))


@pytest.mark.parametrize("mode", [{"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("granularity", ["matrix", "network"])
def test_checkpointing_changes_no_gradient(mode: dict[str, bool], granularity: str, tmp_path: Path) -> None:
    paths = {f"lora{i}": trained.random_lora(tmp_path, i) for i in range(8)}
    actual = []
    for each in (None, mode):
        model = lamella.compose(tiny.bert().double(), paths, MoleConfig(top_k=2, granularity=granularity))
        trained.sharpen(model, 8.0)
        if each is not None:
            model.gradient_checkpointing_enable(each)
            model.enable_input_require_grads()
        model.train()(**tiny.batch(model.get_base_model())).loss.backward()
        actual.append(tiny.gradients(model))
    assert actual[0]
    tiny.assert_same(actual[1], actual[0])


def test_saved_and_loaded_it_is_bit_equal(folder: Path, tmp_path: Path) -> None:
    model = trained.composition("bert", folder, double=False, top_k=2)
    given = tiny.inputs(model.get_base_model())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.bert(), tmp_path)
    assert again.peft_config["default"].top_k == 2
    assert torch.equal(trained.run(again, given), trained.run(model, given))
    said = str(again.base_model.summary())
    assert "used per sequence: 2(x2)" in said
    assert "of 3 LoRAs the 2 with the largest weights are used" in said
    config = MoleConfig.from_pretrained(tmp_path)
    config.top_k = None
    full = PeftModel.from_pretrained(tiny.bert(), tmp_path, config=config)
    assert not torch.equal(trained.run(full, given), trained.run(model, given))


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, "2"])
def test_bad_numbers(top_k: object) -> None:
    with pytest.raises(LamellaError, match=r"top_k=.* must be a whole number from 1 to 1,000,000, or None"):
        MoleConfig(top_k=top_k)


def test_what_cannot_be(folder: Path) -> None:
    with pytest.raises(LamellaError, match="top_k=4 is more than the 3 LoRAs"):
        trained.composition("bert", folder, top_k=4)
    for form in ("block-delta", "published"):
        with pytest.raises(LamellaError, match=f"form='{form}' runs the block with every LoRA.*top_k=1"):
            MoleConfig(top_k=1, form=form)
