"""Many LoRAs in one composition: 128 as files, 1,000 at small width."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests import tiny
from tests.tuners.mole import trained

import lamella
from lamella import MoleConfig, masked_experts, record_routing
from lamella.adapters import read_lora


def train_one_step(model: torch.nn.Module) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()(**tiny.batch(model.get_base_model())).loss.backward()
    optimizer.step()
    assert all(bool(p.grad.any()) for name, p in model.named_parameters() if name.endswith("router.default.bias"))
    model.eval()


def test_128_loras_load_route_train_and_reload(folder: Path, tmp_path: Path) -> None:
    paths = {f"lora{i}": trained.random_lora(folder, i) for i in range(128)}
    model = lamella.compose(tiny.bert(), paths, MoleConfig(top_k=4))
    given = tiny.inputs(model.get_base_model())
    untrained = trained.run(model.eval(), given)
    train_one_step(model)
    weights = trained.weights_seen(model, given)
    assert all(own.shape == (3, 128) and (own.std(dim=0) > 0).any() for own in weights.values())
    trained_to = trained.run(model, given)
    assert not torch.equal(trained_to, untrained)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.bert(), tmp_path)
    assert torch.equal(trained.run(again, given), trained_to)
    with masked_experts(again, drop=[f"lora{i}" for i in range(1, 128)]):
        alone = trained.run(trained.alone("bert", paths["lora0"], double=False), given)
        torch.testing.assert_close(trained.run(again, given), alone, rtol=1e-4, atol=1e-5)


def test_1000_loras_route_and_train_by_one_router(folder: Path) -> None:
    sources = [read_lora(path) for path in trained.loras("bert", folder).values()]
    many = {f"{i}": sources[i % 3] for i in range(999)} | {"last": sources[0]}
    config = MoleConfig(granularity="network", top_k=4, exclude_modules=["pooler.dense"])
    model = lamella.compose(tiny.bert(), many, config)
    said = str(model.base_model.summary())
    assert f"routers: {1000 * 1000 * 32 + 1000 + 1:,} parameters" in said, "query and value of width 16"
    assert "998 998, 999 last" in said
    train_one_step(model)
    with record_routing(model) as trace:
        trained.run(model, tiny.inputs(model.get_base_model()))
    (router,) = trace.frame.groupby(["stack", "module"])
    assert len(router[1]) == 1000
    assert router[1].mean_weight.sum() == pytest.approx(1)


def test_ten_times_each_weighs_as_once_each(folder: Path) -> None:
    sources = [read_lora(path) for path in trained.loras("bert", folder).values()]
    given = tiny.inputs(tiny.bert())
    thirty = lamella.compose(tiny.bert(), {f"{i}": sources[i % 3] for i in range(30)}).eval()
    three = lamella.compose(tiny.bert(), trained.loras("bert", folder)).eval()
    torch.testing.assert_close(trained.run(thirty, given), trained.run(three, given), rtol=1e-4, atol=1e-5)
