"""What a trace says a unit's router did is what it did."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests import tiny
from tests.tuners.mole import trained

import lamella
from lamella import fixed_weights, masked_experts, record_routing
from lamella.tracing import routers_of


@pytest.mark.parametrize("kind", trained.SETTINGS)
@pytest.mark.parametrize("router_input", ["mean", "token"])
def test_each_unit_has_the_mean_weights_that_its_modules_were_given(kind: str, router_input: str, folder: Path) -> None:
    model = trained.composition(kind, folder, router_input=router_input, granularity="sublayer")
    given = tiny.inputs(model.get_base_model())
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(layer, x, weights, frame) -> None:
        mask = frame.token_mask(x, of_encoder=layer.reads_encoder)
        unit = layer.groups["default"]
        if layer is unit.owner:
            rows = weights.flatten(0, -2)
            seen[unit.name] = rows if mask is None or not unit.by_token else rows[mask]

    for layer in trained.layers_of(model).values():
        layer.groups["default"].watchers[:] = [watch]
    with record_routing(model) as trace:
        trained.run(model, given)
    names = {layer.groups["default"].place: layer.groups["default"].name for layer in trained.layers_of(model).values()}
    frame = trace.frame
    assert len(frame) == 3 * len(names)
    for place, name in names.items():
        rows = frame[(frame["stack"] == place.stack) & (frame.layer == place.layer) & (frame.module == place.module)]
        expected = seen[name].double()
        torch.testing.assert_close(torch.tensor(rows.mean_weight.to_numpy()), expected.mean(dim=0))
        entropy = torch.special.entr(expected).sum(dim=-1).mean()
        assert rows.entropy.iloc[0] == pytest.approx(float(entropy))
        assert rows.tokens.iloc[0] == len(expected)
        assert rows.share.tolist() == pytest.approx([1 / 3] * 3)


def test_fixed_weights_are_traced_as_they_are(folder: Path) -> None:
    model = trained.composition("bert", folder)
    given = tiny.inputs(model.get_base_model())
    with fixed_weights(model, {"news": 0.25, "law": 0.75}), record_routing(model) as trace:
        trained.run(model, given)
    assert trace.frame.groupby("expert").mean_weight.mean().tolist() == pytest.approx([0.25, 0.0, 0.75])
    assert trace.frame.groupby("name").mean_weight.mean().to_dict() == pytest.approx(
        {"news": 0.25, "code": 0.0, "law": 0.75}
    )
    assert routers_of(trace.frame) == list(trace.routers)
    with masked_experts(model, drop=["code"]), record_routing(model, per_token=True) as trace:
        trained.run(model, given)
    assert set(trace.tokens.expert) == {0, 2}
    assert trace.frame[trace.frame.expert == 1].share.max() == 0
    assert trace.frame.entropy.max() <= math.log(2) + 1e-9


def test_a_decision_is_counted_once(folder: Path) -> None:
    model = trained.composition("llama", folder, balance="log")
    given = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    with record_routing(model) as trace:
        model.generate(**given, max_new_tokens=4, min_new_tokens=4)
    assert set(trace.frame.tokens) == {1}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with record_routing(model) as trace:
        model.train()(**tiny.batch(model.get_base_model())).loss.backward()
    assert set(trace.frame.tokens) == {3}


@pytest.mark.parametrize("granularity", ["matrix", "sublayer", "block"])
def test_a_block_that_runs_twice_decides_twice(granularity: str, folder: Path) -> None:
    model = trained.composition("bert", folder, granularity=granularity, exclude_modules=["pooler.dense"])
    encoder = model.get_base_model().bert.encoder
    encoder.layer = torch.nn.ModuleList([encoder.layer[0], encoder.layer[0]])
    given = tiny.inputs(model.get_base_model())
    with tiny.watch(model) as seen:
        trained.run(model, given)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [place for place, _, _ in first] == [place for place, _, _ in second]
    for (_, one, _), (_, other, _) in zip(first, second, strict=True):
        assert not torch.allclose(one.dense_weights(), other.dense_weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    model = lamella.compose(tiny.llama().to(dtype), trained.loras("llama", folder)).eval()
    trained.sharpen(model)
    layers = trained.layers_of(model)
    assert {layer.loras("default").A.dtype for layer in layers.values()} == {dtype}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    given = tiny.inputs(model.get_base_model())
    actual = trained.run(model, given)
    assert actual.dtype == dtype
    wide = lamella.compose(tiny.llama(), trained.loras("llama", folder)).eval()
    trained.sharpen(wide)
    torch.testing.assert_close(actual.float(), trained.run(wide, given), rtol=0.1, atol=0.1)
    model.save_pretrained(tmp_path)
    again = lamella.MoleConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama().to(dtype), tmp_path, config=again)
    assert torch.equal(trained.run(loaded, given), actual)


def test_autocast_trains_routers_in_their_own_precision(folder: Path) -> None:
    model = lamella.compose(tiny.bert(), trained.loras("bert", folder)).train()
    trained.sharpen(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**tiny.batch(model.get_base_model())).loss
    loss.backward()
    actual = tiny.gradients(model)
    assert all(gradient.dtype == torch.float32 and torch.isfinite(gradient).all() for gradient in actual.values())
