"""What a block computes, its router's gradient and its balance loss, against the slow oracle."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from tests import tiny
from tests.pairwise import pairwise
from tests.reference import molex as oracle
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lamella
from lamella import LamellaError
from lamella.routing import collect_losses
from lamella.tuners.molex import MolexBlock

DEFAULTS = {"score": "softmax", "aggregate": "mean", "top_k": 1, "router_gradient": "scale", "granularity": "sequence"}


def model_of(**config: Any) -> PeftModel:
    model = tiny.molex(tiny.bert(layers=4).double(), **config).double().train()
    for name, parameter in model.named_parameters():
        if "molex_router" in name:
            parameter.requires_grad_(True)
    return model


def rows_of(batch: dict[str, Tensor]) -> list[Tensor]:
    """Each sequence by itself, without its padding."""
    return [ids[mask.bool()][None] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def plainly(model: PeftModel, batch: dict[str, Tensor], candidates: list[int], **config: Any) -> tuple[Tensor, Tensor]:
    """The model's task loss and balance, sequence by sequence and block by block."""
    config = {**DEFAULTS, **config}
    base = model.get_base_model()
    wrapped = tiny.blocks(model)
    blocks = [lambda h, block=block.base_layer: block(h[None])[0] for block in wrapped]
    router = wrapped[0].router("default")
    means: list[list[Tensor]] = [[] for _ in blocks]
    chosen: list[list[list[int]]] = [[] for _ in blocks]
    logits = []
    for ids in rows_of(batch):
        h = base.bert.embeddings(ids)[0]
        for t in range(len(blocks)):
            h, picked, mean = oracle.layer(
                blocks, t, h, router.weight, router.bias, 0.5, candidates=candidates, top_k=config["top_k"],
                score=config["score"], aggregate=config["aggregate"], form=config["router_gradient"],
                per_token=config["granularity"] == "token",
            )  # fmt: skip
            means[t] += mean
            chosen[t] += picked
        logits.append(base.classifier(base.bert.pooler(h[None]))[0])
    task = torch.nn.functional.cross_entropy(torch.stack(logits), batch["labels"])
    balance = sum(oracle.balance(mean, picks, candidates) for mean, picks in zip(means, chosen, strict=True))
    return task, balance


CHOICES = {
    "score": ("softmax", "sigmoid"),
    "aggregate": ("mean", "mode"),
    "top_k": (1, 2),
    "router_gradient": ("scale", "straight-through", "none"),
    "granularity": ("sequence", "token"),
    "candidates": ("all", [0, 2, 3]),
}


@pytest.mark.parametrize("chosen", pairwise(*CHOICES.values()))
def test_loss_and_every_gradient_are_the_oracles(chosen: tuple[Any, ...]) -> None:
    config = dict(zip(CHOICES, chosen, strict=True))
    model = model_of(**config, router_aux_loss_coef=0.5)
    candidates = config.pop("candidates")
    batch = tiny.batch(model.get_base_model())
    listed = list(range(4)) if candidates == "all" else candidates
    task, balance = plainly(model, batch, listed, **config)
    (task + 0.5 * balance).backward()
    expected = tiny.gradients(model)
    actual = model(**batch).loss
    torch.testing.assert_close(actual, task)
    actual.backward()
    tiny.assert_same(tiny.gradients(model), expected)


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_the_balance_loss_is_collected_as_it_is_attached(granularity: str) -> None:
    model = model_of(router_aux_loss_coef=0.25, granularity=granularity)
    batch = tiny.batch(model.get_base_model())
    with collect_losses() as losses:
        model(**batch)
    _, balance = plainly(model, batch, list(range(4)), granularity=granularity)
    torch.testing.assert_close(losses.total(), 0.25 * balance)
    assert len(losses.by_name) == 4
    with collect_losses() as losses:
        model.eval()(**batch)
    assert not losses.by_name


def test_the_attached_loss_has_the_scale_of_the_task_loss() -> None:
    model = model_of(router_aux_loss_coef=0.5)
    batch = tiny.batch(model.get_base_model())
    model(**batch).loss.backward()
    once = tiny.gradients(model)
    (3 * model(**batch).loss).backward()
    tiny.assert_same(tiny.gradients(model), {name: 3 * gradient for name, gradient in once.items()})


@pytest.mark.parametrize("aggregate", ["mean", "mode"])
def test_the_published_form_decides_once_for_all_real_tokens_of_a_batch(aggregate: str) -> None:
    model = model_of(
        granularity="batch", aggregate=aggregate, router_gradient="none", router_aux_loss_coef=0.5, alpha=0.95
    )
    batch = tiny.batch(model.get_base_model(), pad=3)
    wrapped = tiny.blocks(model)
    inputs: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach())) for b in wrapped]
    with tiny.watch(model) as seen, collect_losses() as losses:
        model(**batch)
    for hook in hooks:
        hook.remove()
    router = wrapped[0].router("default")
    balance = torch.zeros((), dtype=torch.float64)
    for (place, routing, real), h in zip(seen, inputs, strict=True):
        tokens = h[batch["attention_mask"].bool()]
        scores = oracle.token_scores(tokens, router.weight, router.bias, range(4), "softmax")
        picked = oracle.pick(scores, 1, aggregate)
        assert routing.indices.tolist() == [picked], place
        assert real is None
        assert routing.weights.tolist() == [[1.0]]
        balance = balance + 4 * oracle.mean_of(scores)[picked[0]]  # L = T * mean probability of the chosen block
    torch.testing.assert_close(losses.total(), 0.5 * balance)


def runs(model: PeftModel, batch: dict[str, Tensor]) -> list[int]:
    """How often each block ran, with how many sequences in all."""
    counts = [0] * len(tiny.blocks(model))
    hooks = [
        block.base_layer.register_forward_hook(
            lambda module, args, output, at=at: counts.__setitem__(at, counts[at] + len(args[0]))
        )
        for at, block in enumerate(tiny.blocks(model))
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_alpha_1_is_the_base_bit_for_bit_and_runs_no_guest(name: str) -> None:
    base = tiny.build(name)
    batch = tiny.batch(base)
    with torch.no_grad():
        expected = base(**batch).logits
    model = tiny.molex(base, alpha=1.0, lora=None)
    with torch.no_grad(), tiny.watch(model) as seen:
        assert torch.equal(model(**batch).logits, expected)
    assert not seen
    assert runs(model, batch) == [3] * 4


@pytest.mark.parametrize("router_gradient", ["scale", "straight-through"])
def test_a_block_that_chooses_itself_runs_once_and_its_router_has_no_gradient(router_gradient: str) -> None:
    model = tiny.molex(tiny.llama(layers=4), router_scope="per-layer", router_gradient=router_gradient)
    with torch.no_grad():
        for block in tiny.blocks(model):
            router = block.router("default")
            router.weight.zero_()
            router.bias.copy_(torch.nn.functional.one_hot(torch.tensor(block.place.layer), 4))
    batch = tiny.batch(model.get_base_model())
    plain = tiny.molex(tiny.llama(layers=4), policy="self")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert runs(model, batch) == [3] * 4
    model.train()(**batch).loss.backward()
    actual = tiny.gradients(model, "molex_router")
    assert len(actual) == 8, "data-parallel training waits for a gradient of every parameter"
    assert not any(gradient.any() for gradient in actual.values())


def test_each_guest_runs_on_its_own_sequences_alone() -> None:
    model = tiny.molex(tiny.bert(layers=4))
    batch = tiny.batch(model.get_base_model(), rows=6)
    with tiny.watch(model) as seen:
        counts = runs(model, batch)
    expected = [6] * 4
    for place, routing, _ in seen:
        for guest in routing.indices[:, 0].tolist():
            expected[guest] += guest != place.layer
    assert counts == expected
    assert sum(counts) > 24, "nothing was mixed"


@settings(max_examples=6, deadline=None)
@given(alpha=st.floats(0, 1), t=st.integers(0, 3), tau=st.integers(0, 3))
def test_before_a_norm_it_is_the_published_sum_of_updates(alpha: float, t: int, tau: int) -> None:
    model = tiny.molex(tiny.gpt2(layers=4).double(), policy="fixed", fixed_layer=tau, alpha=alpha).double()
    h = torch.randn(2, 5, tiny.HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    block = tiny.blocks(model)[t]

    def update(layer: int) -> Tensor:
        return block.blocks[layer](h) - h

    torch.testing.assert_close(block(h), h + alpha * update(t) + (1 - alpha) * update(tau), rtol=1e-12, atol=1e-12)


def test_uniform_is_the_mean_of_all_candidates() -> None:
    model = tiny.molex(tiny.gpt2(layers=4).double(), policy="uniform", alpha=0.3).double()
    h = torch.randn(2, 5, tiny.HIDDEN, dtype=torch.float64)
    block = tiny.blocks(model)[1]
    outputs = [other(h) for other in block.blocks]
    torch.testing.assert_close(block(h), 0.3 * outputs[1] + 0.7 * sum(outputs) / 4)


def random_choices(model: PeftModel, batch: dict[str, Tensor]) -> list[list[int]]:
    with tiny.watch(model) as seen, torch.no_grad():
        model(**batch)
    return [routing.indices[:, 0].tolist() for _, routing, _ in seen]


@pytest.mark.parametrize("name", ["bert", "llama_labelled", "vit"])
def test_random_is_reproducible_and_uniform(name: str) -> None:
    base = tiny.build(name.removesuffix("_labelled"))
    batch = tiny.batch(base, rows=64, tokens=9)
    model = tiny.molex(base, policy="random")
    first = random_choices(model, batch)
    assert random_choices(model, batch) == first
    half = {key: value[32:] for key, value in batch.items()}
    assert random_choices(model, half) == [row[32:] for row in first]
    counts = torch.bincount(torch.tensor(list(itertools.chain(*first))), minlength=4)
    assert counts.sum() == 256
    assert counts.min() > 40
    assert len({tuple(row) for row in first}) == 4, "every depth draws for itself"
    reseeded = tiny.molex(tiny.build(name.removesuffix("_labelled")), policy="random", seed=1)
    assert random_choices(reseeded, batch) != first


def decoders_choices(model: PeftModel, **given: Any) -> list[list[int]]:
    """Of each sequence, the guests in the decoder at the first forward, by block."""
    with tiny.watch(model) as seen, torch.no_grad():
        (model.generate if "max_new_tokens" in given else model)(**given)
    chosen = [routing.indices[:, 0] for place, routing, _ in seen if place.stack.startswith("decoder")]
    return torch.stack(chosen[:4], dim=1).tolist()


def test_random_in_a_decoder_after_an_encoder_is_by_what_the_encoder_reads() -> None:
    model = tiny.molex(tiny.t5(layers=4), policy="random")
    given = tiny.batch(model.get_base_model(), rows=32)
    first = decoders_choices(model, **given)
    assert len({tuple(row) for row in first}) > 16, "all begin with the same token"
    half = {key: value[16:] for key, value in given.items()}
    assert decoders_choices(model, **half) == first[16:]
    padded = {key: nn.functional.pad(given[key], (3, 0)) for key in ("input_ids", "attention_mask")}
    assert decoders_choices(model, **given | padded) == first
    del given["labels"]
    for options in ({}, {"use_cache": False}):
        assert decoders_choices(model, **given, max_new_tokens=2, **options) == first
    beams = decoders_choices(model, **given, max_new_tokens=2, num_beams=2)
    assert beams == [row for row in first for _ in range(2)]
    with lamella.prompt([1] * 32):
        assert decoders_choices(model, **given, max_new_tokens=2) == first


def test_random_in_a_decoder_that_is_not_told_what_its_encoder_read_is_an_error() -> None:
    model = tiny.molex(tiny.t5(layers=4), policy="random")
    given = tiny.inputs(model.get_base_model())
    whole = model(**given).logits
    encoded = model.get_base_model().get_encoder()(given["input_ids"], given["attention_mask"])
    torch.testing.assert_close(model(**given, encoder_outputs=encoded).logits, whole)
    del given["input_ids"]
    with pytest.raises(LamellaError, match=r"policy='random'.*decoder\.block\.0.*input_ids beside encoder_outputs"):
        model(**given, encoder_outputs=encoded)


@pytest.mark.parametrize("scope", ["shared", "per-layer"])
def test_a_learned_alpha_starts_where_it_says_and_moves(scope: str) -> None:
    fixed = tiny.molex(tiny.llama(layers=4), alpha=0.8)
    model = tiny.molex(tiny.llama(layers=4), alpha=0.8, alpha_mode="learned", alpha_scope=scope)
    batch = tiny.batch(model.get_base_model())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, fixed(**batch).logits)
    with tiny.watch(model) as seen:
        model.train()(**batch).loss.backward()
    actual = list(tiny.gradients(model, "molex_alpha").values())
    mixed = [bool((routing.indices != place.layer).any()) for place, routing, _ in seen]
    assert [bool(gradient != 0) for gradient in actual] == ([True] if scope == "shared" else mixed)
    assert any(mixed)
    assert all(gradient.shape == () for gradient in actual)
    names = ["model.layers"] if scope == "shared" else [block.name for block in tiny.blocks(model)]
    assert model.base_model.alphas() == pytest.approx(dict.fromkeys(names, 0.8))
    assert fixed.base_model.alphas() == {}
    with torch.no_grad():
        assert [float(block.alpha("default")) for block in tiny.blocks(model)] == pytest.approx([0.8] * 4)


def test_the_router_decides_in_float32_whatever_the_model_computes_in() -> None:
    model = tiny.molex(tiny.llama(layers=4).to(torch.bfloat16))
    with tiny.watch(model) as seen, torch.no_grad():
        model(**tiny.inputs(model.get_base_model()))
        with torch.autocast("cpu", torch.bfloat16):
            model(**tiny.inputs(model.get_base_model()))
    assert {routing.logits.dtype for _, routing, _ in seen} == {torch.float32}
    block = tiny.blocks(model)[0]
    assert block.router("default").weight.dtype == torch.float32


def test_guests_in_bfloat16_are_near_and_only_guests() -> None:
    given = tiny.batch(tiny.llama())
    exact, rough = (tiny.molex(tiny.llama(layers=4), alpha=0.9, guest_dtype=d) for d in (None, "bfloat16"))
    dtypes: list[torch.dtype] = []
    tiny.blocks(rough)[0].base_layer.mlp.act_fn.register_forward_hook(lambda _, args, out: dtypes.append(out.dtype))
    attends: list[torch.dtype] = []

    class SeesAttention(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.scaled_dot_product_attention:
                attends.append(args[2].dtype)
            return func(*args, **(kwargs or {}))

    with SeesAttention():
        losses = [model(**given) for model in (exact, rough)]
    a, b = (output.logits for output in losses)
    assert a.dtype == b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.02
    assert dtypes[0] == torch.float32
    assert set(dtypes[1:]) == {torch.bfloat16}
    assert set(attends) == {torch.float32}, "on a CPU attention is slow in bfloat16"
    assert len(attends) > 8
    for output in losses:
        output.loss.backward()
    near, far = tiny.gradients(exact), tiny.gradients(rough)
    assert near.keys() == far.keys()
    scale = max(float(gradient.abs().max()) for gradient in near.values())
    assert 0 < max(float((near[name] - far[name]).abs().max()) for name in near) < 0.02 * scale


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_hidden_states_and_attentions_are_the_mixtures_and_no_guests(name: str) -> None:
    model = tiny.molex(tiny.build(name))
    mixed: list[Tensor] = []
    for block in tiny.blocks(model)[-4:]:
        block.register_forward_hook(lambda _, args, out: mixed.append(out if isinstance(out, Tensor) else out[0]))
    model.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**tiny.inputs(model.get_base_model()), output_hidden_states=True, output_attentions=True)
    decoder = "decoder_" if name == "t5" else ""
    states, attentions = output[f"{decoder}hidden_states"], output[f"{decoder}attentions"]
    assert len(states) == 5
    assert len(attentions) == 4
    for actual, expected in zip(states[1:-1], mixed[:-1], strict=True):
        assert torch.equal(actual, expected)


def test_a_model_asks_the_wrapper_what_it_would_ask_the_block() -> None:
    block = tiny.blocks(tiny.molex(tiny.build("gemma2")))[1]
    assert isinstance(block, MolexBlock)
    assert block.self_attn is block.base_layer.self_attn
    with pytest.raises(AttributeError):
        _ = block.nothing
