"""Under ``torch.compile`` a routed model is one graph, and what it computes is what its own code computes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import lamella
from lamella import LamellaError
from lamella.routing import attach, collect_losses, current_frame, loss_scale, track_calls

Given = dict[str, Tensor]


class Counted:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _forgotten(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    torch.set_num_threads(1)
    caplog.set_level("ERROR", "torch.__trace")  # pytest would keep all that torch says while it traces
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    assert current_frame() is None


def mola(kind: str = "llama", **settings: Any) -> PeftModel:
    modules = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}.get(kind)
    return tiny.adapted(tiny.MODELS[kind](), **{"target_modules": modules, "router_aux_loss_coef": 0.5, **settings})


def mole(folder: Path, kind: str = "llama", **settings: Any) -> PeftModel:
    config = {"balance": "log", "router_aux_loss_coef": 0.5, **settings}
    return trained.composition(kind, folder, double=False, **config)


def batch(model: PeftModel, **shape: Any) -> Given:
    return tiny.batch(model.get_base_model(), **shape)


def unlabelled(given: Given) -> Given:
    return {name: value for name, value in given.items() if name != "labels"}


def step(run: Callable[..., Any], model: PeftModel, *given: Given) -> tuple[list[Tensor], Given]:
    """The losses of micro-batches, all forwards before the first backward pass, and the gradients."""
    losses = [run(**one).loss for one in given]
    for weight, loss in enumerate(losses, 1):
        (loss * 3**-weight).backward()
    return [loss.detach() for loss in losses], tiny.gradients(model)


def assert_same(model: PeftModel, compiled: Callable[..., Any], *given: Given) -> None:
    torch.testing.assert_close(step(compiled, model, *given), step(model, model, *given), rtol=1e-4, atol=1e-6)


def test_a_decoder_trains_in_one_graph_with_padding_and_accumulation() -> None:
    model, backend = mola().train(), Counted()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same(model, compiled, batch(model), batch(model, seed=2))
    assert backend.graphs == 1


@pytest.mark.heavy
def test_one_graph_is_for_any_shape() -> None:
    model, backend = mola().train(), Counted()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    assert_same(model, compiled, batch(model), batch(model, rows=4, tokens=9))
    assert backend.graphs == 1


def test_a_composition_trains_in_one_graph_whatever_its_rows_hold(folder: Path) -> None:
    model, backend = mole(folder).train(), Counted()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    given, packed, prompted = (batch(model, seed=seed) for seed in range(3))
    packed["attention_mask"] = packed["attention_mask"] * torch.tensor([1, 1, 1, 2, 2, 3, 3])  # documents by number
    packed["labels"][:, 3] = -100  # the second begins with what is given
    prompted["labels"][1:, :4] = -100
    assert_same(model, compiled, given, packed, prompted)
    assert backend.graphs == 1


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"granularity": "matrix", "router_input": "token"}),
        ("llama", {"granularity": "network", "router_input": "token", "router": "shared"}),
        ("llama", {"granularity": "sublayer", "balance": "switch"}),
        ("bert", {"granularity": "matrix", "balance": "entropy"}),
        ("bert", {"granularity": "network", "top_k": 1}),
        ("t5", {}),
    ],
)
def test_every_composition_of_deltas_trains_in_one_graph(kind: str, settings: dict[str, Any], folder: Path) -> None:
    model, backend = mole(folder, kind, **settings).train(), Counted()
    model.get_base_model().config.problem_type = "single_label_classification"  # else the first forward sets it
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    assert_same(model, compiled, batch(model), batch(model, rows=4, tokens=9))
    assert backend.graphs == 1


@pytest.mark.heavy
def test_a_compiler_derives_the_gradients_of_a_compositions_routers(folder: Path) -> None:
    model = mole(folder).train()
    assert_same(model, torch.compile(model, backend="aot_eager", fullgraph=True), batch(model))


@torch.no_grad()
def test_a_sequence_goes_on_with_what_a_compiled_composition_has_decided(folder: Path) -> None:
    model, backend = mole(folder), Counted()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ids = batch(model)["input_ids"]
    mask = torch.ones_like(ids)
    cache = compiled(input_ids=ids, attention_mask=mask).past_key_values
    assert backend.graphs == 1
    given = {"input_ids": ids[:, :2], "attention_mask": torch.cat([mask, mask[:, :2]], dim=1)}
    whole = model(input_ids=torch.cat([ids, ids[:, :2]], dim=1)).logits
    torch.testing.assert_close(model(**given, past_key_values=cache).logits, whole[:, -2:], rtol=1e-4, atol=1e-5)
    cache = compiled(input_ids=ids, attention_mask=mask + (torch.arange(7) > 3)).past_key_values  # two documents
    with pytest.raises(LamellaError, match=r"has not decided: .*as documents packed into a row"):
        model(**given, past_key_values=cache)


def molex(kind: str = "bert", **settings: Any) -> PeftModel:
    return tiny.molex(tiny.build(kind, layers=2), **settings)


METHODS = ("mola", "mole", "molex")


def adapted(method: str, folder: Path, kind: str) -> PeftModel:
    return {"mola": mola, "molex": molex}[method](kind) if method != "mole" else mole(folder, kind)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bert", {"policy": "fixed", "fixed_layer": 1}),
        pytest.param("bert", {"policy": "self"}, marks=pytest.mark.heavy),
        pytest.param("llama", {"policy": "self"}, marks=pytest.mark.heavy),
        pytest.param("llama", {"policy": "uniform", "alpha_mode": "learned"}, marks=pytest.mark.heavy),
    ],
)
def test_guests_that_no_number_chooses_train_in_one_graph(kind: str, settings: dict[str, Any]) -> None:
    model, backend = molex(kind, **settings).train(), Counted()
    given = batch(model) | ({"use_cache": False} if settings["policy"] == "uniform" else {})
    assert_same(model, torch.compile(model, backend=backend, fullgraph=True), given)
    assert backend.graphs == 1


@pytest.mark.parametrize("kind", ["bert", pytest.param("llama", marks=pytest.mark.heavy)])
def test_guests_that_a_router_chooses_end_one_graph_in_each_block(kind: str) -> None:
    model, backend = molex(kind, router_aux_loss_coef=0.5).train(), Counted()
    given = batch(model) | ({"use_cache": False} if kind == "llama" else {})
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    assert_same(model, torch.compile(model, backend=backend), given)
    assert len(breaks) == 1, breaks
    assert "MolexBlock._mixed" in next(iter(breaks))
    assert backend.graphs > 1


class Layer(nn.Module):
    """A router alone, which pays for its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits, frame = x @ self.weight, current_frame()
        assert frame is not None
        mixed = attach(logits.relu(), logits, Tensor.sum, torch.ones_like, (), frame, "layer")
        return {"logits": mixed, "other": mixed + 1}


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_loss_built_outside_has_its_scale_in_the_balance_loss(scale: float) -> None:
    layer, backend, x = Layer().train(), Counted(), torch.tensor([[1.0, 2.0], [0.5, -3.0]])
    track_calls(layer)
    found = []
    for run in (torch.compile(layer, backend=backend), layer):
        with loss_scale(layer, scale):
            (scale * run(x)["other"].square().mean()).backward()
        found.append(tiny.gradients(layer))
    tiny.assert_same(*found)
    assert backend.graphs > 0


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_answers_compiled_and_is_its_own_code_while_it_is_watched(method: str, folder: Path) -> None:
    model, backend = adapted(method, folder, "bert"), Counted()
    compiled = torch.compile(model, backend=backend, fullgraph=method != "molex")
    given = unlabelled(batch(model))
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits)
        assert backend.graphs == 1 or method == "molex"
        with lamella.record_routing(compiled) as seen:
            compiled(**given)
        with lamella.record_routing(model) as expected:
            model(**given)
    assert seen.counts.keys() == expected.counts.keys() != set()
    assert all(torch.equal(seen.counts[key], expected.counts[key]) for key in seen.counts)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@pytest.mark.parametrize("method", ["mola", "mole"])
def test_an_encoder_is_exported_for_any_shape(method: str, folder: Path) -> None:
    model = (mola("bert") if method == "mola" else mole(folder, "bert")).get_base_model()
    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    given, other = (unlabelled(tiny.batch(model, **shape)) for shape in ({}, {"rows": 5, "tokens": 6}))
    with torch.no_grad():
        exported = torch.export.export(
            Logits(model).eval(), (), given, dynamic_shapes={"input_ids": auto, "attention_mask": auto}
        )
        torch.testing.assert_close(exported.module()(**other), model(**other).logits)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"num_experts": 64, "r": 4, "router_z_loss_coef": 0.1}),  # sorted where it is not compiled
        ("llama", {"share_lora_a": True}),
        ("llama", {"init_lora_weights": "svd", "num_experts": 2, "r": 1, "top_k": 1}),
        ("bert", {"router": "cosine", "mixing_weights": "equal"}),
        ("t5", {}),
    ],
)
def test_every_form_trains_in_one_graph(kind: str, settings: dict[str, Any]) -> None:
    model, backend = mola(kind, target_modules=None, **settings).train(), Counted()
    assert_same(model, torch.compile(model, backend=backend, fullgraph=True), batch(model))
    assert backend.graphs == 1


@pytest.mark.heavy
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiler_derives_the_same_gradients(backend: str) -> None:
    model = mola(target_modules=None).train()
    assert_same(model, torch.compile(model, backend=backend, fullgraph=True), batch(model))


@pytest.mark.heavy
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_are_recomputed_outside_the_graph(reentrant: bool) -> None:
    model, backend = mola().train(), Counted()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(model, torch.compile(model, backend=backend), batch(model))
    assert backend.graphs > 1


@pytest.mark.heavy
def test_a_model_whose_loss_is_built_outside_is_few_graphs() -> None:
    model, backend = mola().train(), Counted()
    given = unlabelled(batch(model))
    found = []
    for run in (torch.compile(model, backend=backend), model):
        with loss_scale(model, 0.25):
            (0.25 * run(**given).logits.square().mean()).backward()
        found.append(tiny.gradients(model))
    tiny.assert_same(*found)
    assert backend.graphs <= 4  # before the model, the model, after it


@pytest.mark.heavy
def test_collected_losses_are_those_of_its_own_code() -> None:
    model = mola().train()
    found = []
    for run in (torch.compile(model, backend="eager"), model):
        with collect_losses() as losses:
            run(**batch(model))
        found.append(dict(losses.by_name))
    torch.testing.assert_close(*found)


@pytest.mark.heavy
@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_compiles(method: str, folder: Path, tmp_path: Path) -> None:
    trained = []
    for settings in ({"torch_compile": True, "torch_compile_backend": "eager"}, {}):
        model = adapted(method, folder, "llama").train()
        given = batch(model, rows=4, pad=0)
        rows = [{name: value[n] for name, value in given.items()} for n in range(4)]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-2, **settings,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        trained.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*trained)
