"""One MoLA layer against the loops of tests/reference, and against PEFT's own LoRA."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import tiny
from tests.reference import mola
from torch import Tensor, nn

from lamella import MolaConfig
from lamella.backbones import Place
from lamella.tuners.mola.experts import MolaExperts

FLOAT64 = {"rtol": 1e-9, "atol": 1e-9}


def layers_of(model: nn.Module) -> dict[str, tiny.MolaLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, tiny.MolaLinear)}


def by_loops(layer: tiny.MolaLinear, x: Tensor) -> Tensor:
    A, B = layer.lamella_mola_lora_A["default"].weight, layer.lamella_mola_lora_B["default"].weight
    A = A.expand(len(B), -1, -1)  # of one that all share
    settings = layer.experts["default"]
    flat = x.reshape(-1, x.shape[-1])
    y = layer.base_layer(x).reshape(-1, B.shape[1])
    if not layer.routed("default"):
        chosen = [{0: torch.ones((), dtype=x.dtype)}] * len(flat)
    else:
        router = layer.lamella_mola_router["default"]
        if hasattr(router, "log_scale"):
            logits = mola.cosine_logits(flat, router.weight, router.log_scale)
        else:
            logits = mola.linear_logits(flat, router.weight)
        chosen = mola.choose(logits, settings.top_k, equal=router.mixing_weights == "equal")
    if settings.start:
        starts = layer.lamella_mola_start_A["default"].weight, layer.lamella_mola_start_B["default"].weight
        y = mola.less_starts(y, flat, *starts, chosen, settings.scaling, published=settings.start == "goat")
    return mola.mola(y, flat, A, B, chosen, settings.scaling).view(*x.shape[:-1], -1)


def backward(function: Callable[[Tensor], Tensor], layer: tiny.MolaLinear, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    result = function(x)
    (result * torch.linspace(-1, 2, result.numel(), dtype=x.dtype).view_as(result)).sum().backward()
    return {"output": result.detach(), "x": x.grad, **tiny.gradients(layer)}


@pytest.mark.parametrize(("name", "router"), [("bert", "cosine"), ("gpt2", "linear")])  # nn.Linear and Conv1D
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 1), (3, 2), (4, 4), (6, 2)])
@pytest.mark.parametrize("form", ["dense", "sorted"])
def test_a_layer_equals_the_loops(
    name: str, router: str, experts: int, top_k: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    equals_the_loops(name, form, monkeypatch, router=router, num_experts=experts, top_k=top_k)


@pytest.mark.parametrize(
    "options",
    [
        {"mixing_weights": "equal"},
        {"share_lora_a": True},
        {"init_lora_weights": "svd"},
        {"init_lora_weights": "svd", "num_experts": 1, "top_k": 1},
        {"init_lora_weights": "goat"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "form"), [("bert", "sorted"), ("gpt2", "dense")])
def test_and_so_it_does_with_each_option(name: str, form: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    equals_the_loops(name, form, monkeypatch, **{"num_experts": 4, **options})


def equals_the_loops(name: str, form: str, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
    monkeypatch.setattr("lamella.kernels.sorted.SORTED_ABOVE", 1 if form == "sorted" else 10**6)
    model = tiny.adapted(tiny.MODELS[name](layers=1).double(), **config).double()
    torch.manual_seed(3)
    for layer in layers_of(model).values():
        with torch.no_grad():
            layer.lamella_mola_lora_B["default"].weight.add_(0.1)  # off what it may have started from
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
        actual, expected = backward(layer, layer, x), backward(lambda x, layer=layer: by_loops(layer, x), layer, x)
        tiny.assert_same(actual, expected, **FLOAT64)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        assert len(actual) == 2 + len(trained)
        for tokens in (1, 3, 17):  # one, few and many in a forward without gradients
            x = torch.randn(1, tokens, layer.in_features, dtype=torch.float64)
            with torch.no_grad():
                torch.testing.assert_close(layer.eval()(x), by_loops(layer, x), **FLOAT64)


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_whoever_watches_or_replaces_experts_sees_few_tokens_too(tokens: int) -> None:
    layer = next(iter(layers_of(tiny.adapted(tiny.bert(layers=1).double()).double().eval()).values()))
    family, seen = MolaExperts("default"), []
    nothing = dict.fromkeys(range(3), lambda x: x.new_zeros(len(x), layer.out_features))
    x = torch.randn(1, tokens, layer.in_features, dtype=torch.float64)
    watched = family.watched(layer, lambda x, routing: seen.append(len(routing.indices)))
    with torch.no_grad(), watched, family.replaced(layer, nothing):
        y = layer(x)
    assert seen == [tokens]
    torch.testing.assert_close(y, layer.base_layer(x), rtol=0, atol=1e-12)


def test_the_scaling_is_lora_alpha_over_r_or_over_its_root() -> None:
    assert all(
        layer.experts["default"].scaling == 3.0
        for layer in layers_of(tiny.adapted(tiny.bert(), r=4, lora_alpha=12)).values()
    )
    rooted = tiny.adapted(tiny.bert(), r=4, lora_alpha=12, use_rslora=True)
    assert all(layer.experts["default"].scaling == 6.0 for layer in layers_of(rooted).values())


@pytest.mark.parametrize(
    ("name", "router"), [("bert", "linear"), ("gpt2", "cosine"), ("llama", "linear"), ("t5", "cosine")]
)
def test_b_zero_is_the_base_bit_for_bit(name: str, router: str) -> None:
    model = tiny.MODELS[name]()
    given = tiny.batch(model)
    with torch.no_grad():
        base = model(**given)
        adapted = tiny.adapted(model, init_lora_weights=True, router=router)
        assert torch.equal(adapted(**given).logits, base.logits)
        assert torch.equal(adapted(**given).loss, base.loss)
    assert any((layer.lamella_mola_lora_A["default"].weight != 0).all() for layer in layers_of(adapted).values())


def as_lora(model: PeftModel, base: nn.Module, **config: Any) -> PeftModel:
    """PEFT's LoRA with the A and B of a mixture of one expert."""
    lora = get_peft_model(base, LoraConfig(target_modules=list(layers_of(model.get_base_model())), **config))
    for name, layer in layers_of(model.get_base_model()).items():
        peft_layer = lora.get_base_model().get_submodule(name)
        with torch.no_grad():
            peft_layer.lora_A["default"].weight.copy_(layer.lamella_mola_lora_A["default"].weight[0])
            peft_layer.lora_B["default"].weight.copy_(layer.lamella_mola_lora_B["default"].weight[0])
    return lora


@pytest.mark.parametrize(("name", "use_rslora"), [("bert", False), ("gpt2", True), ("llama", True), ("t5", False)])
def test_one_expert_is_pefts_lora_in_outputs_and_gradients(name: str, use_rslora: bool) -> None:
    config = {"r": 3, "lora_alpha": 5, "use_rslora": use_rslora}
    model = tiny.adapted(
        tiny.MODELS[name]().double(), num_experts=1, top_k=1, router_aux_loss_coef=0.5, **config
    ).double()
    lora = as_lora(model, tiny.MODELS[name]().double(), **config).double()
    given = tiny.batch(model.get_base_model())
    mine, theirs = model.train()(**given), lora.train()(**given)
    torch.testing.assert_close(mine.logits, theirs.logits, **FLOAT64)
    mine.loss.backward()
    theirs.loss.backward()
    actual, expected = tiny.gradients(model), tiny.gradients(lora)
    assert not any("router" in key for key in actual)
    renamed = {key.replace(".lora_", ".lamella_mola_lora_"): gradient[None] for key, gradient in expected.items()}
    tiny.assert_same(actual, renamed, **FLOAT64)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_dense_and_sorted_forms_train_the_same_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for threshold in (10**6, 1):
        monkeypatch.setattr("lamella.kernels.sorted.SORTED_ABOVE", threshold)
        model = tiny.adapted(tiny.MODELS[name]().double(), num_experts=4, router_aux_loss_coef=0.5).double().train()
        assert all(layer.experts["default"].is_dense == (threshold > 1) for layer in layers_of(model).values())
        output = model(**tiny.batch(model.get_base_model()))
        output.loss.backward()
        results.append({"logits": output.logits.detach(), **tiny.gradients(model)})
    tiny.assert_same(*results)


@pytest.mark.parametrize(("name", "threshold"), [("bert", 1), ("gpt2", 10**6), ("llama", 10**6), ("t5", 1)])
def test_sharing_a_gemm_changes_nothing(name: str, threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamella.kernels.sorted.SORTED_ABOVE", threshold)
    results = []
    for shared in (True, False):
        model = tiny.adapted(tiny.MODELS[name]().double(), num_experts=4, router_aux_loss_coef=0.5).double().train()
        for layer in layers_of(model).values():
            layer.same_input = layer.same_input if shared else [layer]
        output = model(**tiny.batch(model.get_base_model()))
        output.loss.backward()
        results.append({"logits": output.logits.detach(), **tiny.gradients(model)})
    tiny.assert_same(*results)


def test_sharing_counts_one_gemm_for_q_k_and_v(monkeypatch: pytest.MonkeyPatch) -> None:
    from lamella.tuners.mola import layer as room

    widths: list[int] = []
    project = room.project
    monkeypatch.setattr(room, "project", lambda x, factors: widths.append(len(factors)) or project(x, factors))
    model = tiny.adapted(tiny.llama(layers=1))
    model(**tiny.inputs(model.get_base_model()))
    assert widths == [6, 2, 4, 2]  # q, k, v with a router each; o; gate and up; down


def test_dropout_changes_training_only_and_spares_the_router() -> None:
    model = tiny.adapted(tiny.bert(layers=1), lora_dropout=0.5)
    plain = tiny.adapted(tiny.bert(layers=1))
    given = tiny.inputs(model.get_base_model())
    with torch.no_grad():
        assert torch.equal(model.eval()(**given).logits, plain.eval()(**given).logits)
        torch.manual_seed(0)
        assert not torch.allclose(model.train()(**given).logits, plain.train()(**given).logits)
        query = model.get_base_model().bert.encoder.layer[0].attention.self.query
        x = torch.randn(1, 5, query.in_features)
        decisions = []
        for dropped in (model, plain):
            with tiny.watch(dropped) as seen:
                dropped.train()(**given)
            decisions.append(seen[0][1].logits)
        torch.testing.assert_close(*decisions)
        assert not torch.equal(query(x), query(x))


@pytest.mark.parametrize("threshold", [1, 10**6])
def test_dropout_draws_one_mask_per_module_and_keeps_the_mean(threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamella.kernels.sorted.SORTED_ABOVE", threshold)
    model = tiny.adapted(tiny.bert(layers=1).double(), lora_dropout=0.5, num_experts=4).double()
    query = model.get_base_model().bert.encoder.layer[0].attention.self.query.train()
    calls: list[Tensor] = []
    dropout = query.lamella_mola_dropout["default"]
    dropout.register_forward_hook(lambda module, args, output: calls.append(output))
    x = torch.randn(1, 4, query.in_features, dtype=torch.float64)
    result = query(x)
    assert len(calls) == 1  # all experts see the same dropped input
    (dropped,) = calls
    assert (dropped == 0).any()
    # Each token's delta is its weights' mixture of the dropped input, with the router reading the undropped one.
    router = query.lamella_mola_router["default"]
    chosen = mola.choose(mola.linear_logits(x[0], router.weight), 2)
    A, B = query.lamella_mola_lora_A["default"].weight, query.lamella_mola_lora_B["default"].weight
    expected = mola.mola(query.base_layer(x)[0], dropped[0], A, B, chosen, query.experts["default"].scaling)
    torch.testing.assert_close(result[0], expected, **FLOAT64)


@pytest.mark.parametrize("threshold", [1, 10**6])
def test_dropped_experts_are_left_out_in_training_alone(threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamella.kernels.sorted.SORTED_ABOVE", threshold)
    model = tiny.adapted(tiny.bert(layers=1).double(), expert_dropout=0.4, num_experts=4).double()
    query = model.get_base_model().bert.encoder.layer[0].attention.self.query
    x = torch.randn(1, 9, query.in_features, dtype=torch.float64)
    torch.testing.assert_close(query.eval()(x), by_loops(query, x), **FLOAT64)

    torch.manual_seed(3)
    actual = backward(query.train(), query, x)
    torch.manual_seed(3)
    kept = torch.dropout(torch.ones(9, 2, dtype=torch.float64), 0.4, train=True) > 0
    assert 0 < int(kept.sum()) < 18

    def dropping(x: Tensor) -> Tensor:
        chosen = mola.choose(mola.linear_logits(x[0], query.lamella_mola_router["default"].weight), 2)
        left, factors = mola.without_dropped(chosen, kept, 0.4), query.factors("default")
        return mola.mola(query.base_layer(x)[0], x[0], *factors, left, query.experts["default"].scaling)[None]

    tiny.assert_same(actual, backward(dropping, query, x), **FLOAT64)


def test_the_base_layers_output_is_not_overwritten_where_somebody_else_holds_it() -> None:
    model = tiny.adapted(tiny.bert(layers=1))
    query = model.get_base_model().bert.encoder.layer[0].attention.self.query
    held: list[Tensor] = []
    query.base_layer.register_forward_hook(lambda module, args, output: held.append(output))
    x = torch.randn(1, 4, query.in_features)
    query(x)
    torch.testing.assert_close(held[0], nn.functional.linear(x, query.base_layer.weight, query.base_layer.bias))


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("experts", [1, 3])
def test_a_layer_maps_no_tokens_to_no_tokens(tokens: int, experts: int) -> None:
    model = tiny.adapted(tiny.bert(layers=1), num_experts=experts, top_k=1)
    query = model.get_base_model().bert.encoder.layer[0].attention.self.query
    result = query(torch.randn(2, tokens, query.in_features))
    assert result.shape == (2, tokens, query.out_features)
    result.sum().backward()


def test_a_sibling_given_another_input_computes_for_itself() -> None:
    results = []
    for shared in (True, False):
        model = tiny.adapted(tiny.llama(layers=1).double()).double()
        attention = model.get_base_model().model.layers[0].self_attn
        # As a hook of accelerate or of a user may: k no longer reads what q read.
        attention.k_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        for layer in layers_of(model).values():
            layer.same_input = layer.same_input if shared else [layer]
        output = model(**tiny.batch(model.get_base_model()))
        output.loss.backward()
        results.append({"logits": output.logits.detach(), **tiny.gradients(model)})
    tiny.assert_same(*results)


def test_top_one_learns_which_of_two_contradicting_maps_a_token_needs() -> None:
    """A rotation on one side of a plane and its opposite on the other: no single map is better than zero."""
    torch.manual_seed(0)
    base = nn.Linear(8, 8, bias=False).requires_grad_(False)
    nn.init.zeros_(base.weight)
    layer = tiny.MolaLinear(base, Place("layers", 0, "linear"))
    layer.update_layer("default", MolaConfig(r=8, lora_alpha=8, router_aux_loss_coef=0.0), num_experts=2, top_k=1)
    layer.set_adapter(["default"])
    side, rotation = torch.randn(8), torch.linalg.qr(torch.randn(8, 8))[0]
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    unexplained = []
    for _ in range(200):
        x = torch.randn(64, 8)
        y = (x @ side).sign()[:, None] * (x @ rotation)
        loss = (layer(x) - y).square().sum() / y.square().sum()
        unexplained.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(unexplained[-10:]) / 10 < 0.15
