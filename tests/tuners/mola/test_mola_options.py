"""What MoLA's experts can share or start from holds on every way into and out of an adapter."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny
from tests.reference import mola
from torch import Tensor, nn

import lamella
from lamella import LamellaError, MolaConfig, doctor, preflight
from lamella.findings import Examination
from lamella.lab.studies.costs import active_parameters
from lamella.tuners.routed import routed_layers

OPTIONS: dict[str, dict[str, Any]] = {
    "shared A": {"share_lora_a": True},
    "svd": {"init_lora_weights": "svd"},
    "goat": {"init_lora_weights": "goat"},
}


def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def off_start(model: PeftModel) -> PeftModel:
    """The adapter with other factors than it began with."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(option: str, base: nn.Module | None = None, **config: Any) -> PeftModel:
    return off_start(tiny.adapted(base or tiny.llama(layers=1), **{**config, **OPTIONS[option]}))


@pytest.mark.parametrize("option", OPTIONS)
def test_saved_and_loaded_it_is_bit_equal(option: str, tmp_path: Path) -> None:
    model = adapted(option, tiny.gpt2(), num_experts=[1, 3], top_k=[1, 2])
    given = tiny.inputs(model.get_base_model())
    model.save_pretrained(tmp_path)
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(tiny.gpt2(), tmp_path, **options).eval()
        assert torch.equal(run(again, given), run(model, given))
    with again.disable_adapter():
        assert torch.equal(run(again, given), run(tiny.gpt2(), given))


@pytest.mark.parametrize("start", ["svd", "goat"])
def test_what_is_subtracted_is_as_precise_as_what_it_is_subtracted_from_and_never_trains(
    start: str, tmp_path: Path
) -> None:
    tiny.adapted(tiny.bert(layers=1), init_lora_weights=start, target_modules=["query"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.bert(layers=1).bfloat16(), tmp_path, is_trainable=True)
    model.load_adapter(tmp_path, "other", is_trainable=True)
    for name in ("other", "default"):
        model.set_adapter(name)
        layer = next(module for module in model.modules() if isinstance(module, tiny.MolaLinear))
        assert layer.is_as_started(name)
        assert not any(one.requires_grad for one in layer.starts(name))
        assert all(one.requires_grad for one in layer.factors(name))


@pytest.mark.parametrize("option", OPTIONS)
def test_the_exported_experts_weighted_by_the_routers_are_the_mixture(option: str, tmp_path: Path) -> None:
    model = adapted(option, tiny.bert(), num_experts=[2, 3], target_modules=["query"])
    folders = lamella.export_experts(model, tmp_path)
    loras = [PeftModel.from_pretrained(tiny.bert(), folder) for folder in folders]
    for block in (0, 1):
        layer = model.get_base_model().bert.encoder.layer[block].attention.self.query
        x = torch.randn(4, layer.in_features)
        weights = layer.lamella_mola_router["default"](x, 2).dense_weights()
        base = layer.base_layer(x)
        total = base.clone()
        for expert in range(block + 2):
            query = loras[expert].get_base_model().bert.encoder.layer[block].attention.self.query
            total += weights[:, expert, None] * (query(x) - base)
        torch.testing.assert_close(layer(x), total)


@pytest.mark.parametrize("option", OPTIONS)
def test_constant_weights_collapse_exactly(option: str) -> None:
    model = adapted(option, num_experts=3, top_k=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.zero_()
    given = [tiny.inputs(model.get_base_model(), rows=4, tokens=9, seed=seed) for seed in range(2)]
    assert lamella.collapse(model, given).error < 1e-4


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_redundancy_is_that_of_what_each_expert_adds(option: str) -> None:
    model = adapted(option, num_experts=3, target_modules=["q_proj"]).double()
    (layer,) = [module for module in model.modules() if isinstance(module, tiny.MolaLinear)]
    each = [lamella.moe_layers(model)[0].experts[expert] for expert in range(3)]
    unit = torch.eye(layer.in_features, dtype=torch.float64)
    deltas = [expert(unit) for expert in each]
    distances = [torch.linalg.matrix_norm(one - other) for one, other in itertools.combinations(deltas, 2)]
    norms = [torch.linalg.matrix_norm(delta) for delta in deltas]
    raw = torch.stack(distances).mean()
    (row,) = lamella.redundancy(model).itertuples()
    assert (row.raw, row.normalised) == pytest.approx((float(raw), float(raw / torch.stack(norms).mean())), rel=1e-9)


@pytest.mark.parametrize("option", OPTIONS)
def test_experts_that_are_more_than_their_tensors_cannot_be_swapped(option: str) -> None:
    model = adapted(option, tiny.llama(), target_modules=["q_proj"])
    reason = "share one A" if option == "shared A" else "are differences"
    with pytest.raises(LamellaError, match=f"q_proj {reason}"), lamella.similarity.swap(model, (0, 0), (1, 1)):
        pass


def test_a_shared_a_counts_once_and_is_never_idle() -> None:
    model = tiny.adapted(tiny.bert(layers=1), r=2, num_experts=4, top_k=1, target_modules=["query"], share_lora_a=True)
    A, B, router = 2 * tiny.HIDDEN, 4 * 2 * tiny.HIDDEN, 4 * tiny.HIDDEN
    assert model.get_nb_trainable_parameters()[0] == model.base_model.summary().trainable == A + B + router
    assert active_parameters(model) == A + B // 4 + router


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("start", ["svd", "goat"])
@torch.no_grad()
def test_experts_start_from_segments_of_the_singular_vectors(name: str, start: str) -> None:
    model = tiny.adapted(tiny.MODELS[name](layers=1), num_experts=4, init_lora_weights=start)
    for layer in (module for module in model.modules() if isinstance(module, tiny.MolaLinear)):
        weight = layer.base_layer.weight.T if name == "gpt2" else layer.base_layer.weight
        A, B = mola.segment_starts(weight, 4, 2, layer.experts["default"].scaling)
        torch.testing.assert_close(torch.bmm(layer.factors("default")[1], layer.factors("default")[0]), torch.bmm(B, A))


def test_the_exact_start_is_the_base_in_training_too_and_learns() -> None:
    base = tiny.bert().double()
    given = tiny.batch(base)
    expected = base(**given)
    model = tiny.adapted(base, num_experts=4, init_lora_weights="svd", lora_dropout=0.3).double().train()
    torch.testing.assert_close(model(**given).logits, expected.logits, rtol=0, atol=1e-12)
    assert all(layer.untrained for layer in routed_layers(model))
    model(**given).loss.backward()
    assert all(gradient.any() for name, gradient in tiny.gradients(model, "lora_").items())
    assert doctor(model).ok
    assert not any(layer.untrained for layer in routed_layers(off_start(model)))


def test_the_published_start_is_the_base_in_the_mean_alone_and_the_preflight_says_how_far() -> None:
    model = tiny.adapted(tiny.bert(), num_experts=4, init_lora_weights="goat")
    layer = next(module for module in model.modules() if isinstance(module, tiny.MolaLinear))
    A, B = layer.expert_factors("default")
    torch.testing.assert_close(torch.bmm(B, A).mean(dim=0), torch.zeros(tiny.HIDDEN, tiny.HIDDEN), rtol=0, atol=1e-6)
    assert "keeps the base in the mean over experts alone" in str(model.base_model.summary())
    given, x = tiny.batch(model.get_base_model()), []
    layer.register_forward_pre_hook(lambda module, args: x.append(args[0]))
    (said,) = [line for line in preflight(model, given).checked if "start of adapter" in line]
    with torch.no_grad():
        base = layer.base_layer(x[0])
        share = float((layer(x[0]) - base).norm() / base.norm())
    assert share > 0
    shares = [float(part) for part in re.findall(r"([0-9.]+)%", said)]
    assert shares[0] <= shares[1]
    assert 100 * share <= shares[1] + 0.01
    examination = Examination()
    model.base_model.examine(model, lambda: 0.0, examination)  # of a batch that goes past the adapted modules
    assert not examination.checked
    assert not [line for line in doctor(off_start(model)).checked if "start of adapter" in line]


@torch.no_grad()
def test_one_expert_with_a_start_is_converted_to_the_lora_that_it_is() -> None:
    model = adapted("svd", tiny.gpt2(), num_experts=1)
    layer = next(module for module in model.modules() if isinstance(module, tiny.MolaLinear))
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(x @ layer.get_delta_weight("default"), layer(x) - layer.base_layer(x))


def test_a_start_that_cannot_be_is_refused() -> None:
    with pytest.raises(LamellaError, match=r"(?s)starts 9 experts of rank 2 .*layer.0.attention.self.query.* has 16"):
        tiny.adapted(tiny.bert(), num_experts=9, init_lora_weights="svd")
    with pytest.raises(LamellaError, match="share_lora_a=True must be False with init_lora_weights='goat'"):
        MolaConfig(share_lora_a=True, init_lora_weights="goat")
    with torch.device("meta"):
        tiny.adapted(tiny.bert(), init_lora_weights="svd")  # to be counted
